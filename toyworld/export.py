"""Stage "export": turn the work folder's trained weights into the committed assets."""

from __future__ import annotations

import argparse

import torch

from . import assets
from .training import WORK, log


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


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """What training left of one asset."""
    if name == "generator":
        return generator_tensors()
    return assets.read(name, WORK) if name == "adapter" else torch.load(WORK / f"{name}.pt", weights_only=True)


def main(arguments: list[str]) -> None:
    """Export what is trained; --only names the assets to renew."""
    parser = argparse.ArgumentParser(prog="run.py export")
    names = ("generator", "judge", "dino", "measure", "clip", "adapter")
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    for name in parser.parse_args(arguments).only:
        path = assets.write(name, tensors_of(name))
        log(path.name, f"{path.stat().st_size / 1e6:.2f} MB")
