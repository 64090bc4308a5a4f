"""Stage "export": turn the work folder's trained weights into the committed assets."""

from __future__ import annotations

import argparse

import torch

from . import assets
from .training import WORK, log

STUDENTS = {"turbo": "unet", "flow_turbo": "flow"}  # and whose they are
IN_BYTES = ("flow", "flow_turbo")


def generator_tensors() -> dict[str, torch.Tensor]:
    """UNet, text encoder, vocabulary, autoencoder and latent normalisation under one roof."""
    autoencoder = torch.load(WORK / "ae.pt", weights_only=True)
    trained = torch.load(WORK / "unet.pt", weights_only=True)
    tensors = {f"{part}.{key}": value for part in ("unet", "text") for key, value in trained[part].items()}
    tensors |= {f"{part}.{key}": value for part in ("encoder", "decoder") for key, value in autoencoder[part].items()}
    log("UNet after", trained["steps"], "steps")
    return {
        **tensors,
        "vocabulary": torch.tensor(trained["vocabulary"], dtype=torch.int32),
        "latent.shift": trained["shift"].float(),
        "latent.scale": trained["scale"].float(),
    }


def flow_tensors() -> dict[str, torch.Tensor]:
    """The flow transformer, its autoencoder, and what normalises its latents and its text."""
    trained = torch.load(WORK / "flow.pt", weights_only=True)
    autoencoder = torch.load(WORK / "ae16.pt", weights_only=True)
    tensors = {f"{part}.{key}": value for part in ("encoder", "decoder") for key, value in autoencoder[part].items()}
    log("flow transformer after", trained["steps"], "steps")
    return {
        **tensors,
        **without_positions(trained["network"]),
        "latent.shift": trained["shift"].float(),
        "latent.scale": trained["scale"].float(),
        "context.mean": trained["mean"],
        "context.std": trained["std"],
    }


def without_positions(network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's tensors under its name in a world; the table of positions is not trained but computed."""
    return {f"network.{key}": value for key, value in network.items() if key != "pos_embed"}


def student_tensors(world: str) -> dict[str, torch.Tensor]:
    """What a student has of its own: the network."""
    trained = torch.load(WORK / f"student_{world}.pt", weights_only=True)
    log("student after", trained["steps"], "steps")
    return without_positions(trained["network"])


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """What training left of one asset."""
    own = {"generator": generator_tensors, "flow": flow_tensors}
    if name in own:
        return own[name]()
    if name in STUDENTS:
        return student_tensors(STUDENTS[name])
    return assets.read(name, WORK) if name == "adapter" else torch.load(WORK / f"{name}.pt", weights_only=True)


def main(arguments: list[str]) -> None:
    """Export what is trained; --only names the assets to renew."""
    parser = argparse.ArgumentParser(prog="run.py export")
    names = ("generator", "judge", "dino", "measure", "clip", "adapter", "fine", "flow", *STUDENTS)
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    for name in parser.parse_args(arguments).only:
        tensors = tensors_of(name)
        path = assets.write(name, assets.in_bytes(tensors) if name in IN_BYTES else tensors)
        log(path.name, f"{path.stat().st_size / 1e6:.2f} MB")
