"""Stage "check": what the subject is worth to the committed adapter, on subjects that no training has seen.

The error of the predicted noise, by timestep: of the UNet alone, with the adapter and the subject's picture, and with
the picture of another subject in its place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from ..core.ezigen.adapter import batch_tokens
from ..core.ezigen.artifact import read_adapter
from ..core.ezigen.train import at_timestep, subject_features
from . import assets, comfyui, subjects, training, world
from .pairs import encoded as latents_of
from .pairs import subject_prompt
from .training import log

SEED = 5_000_000
TIMESTEPS = (50, 150, 250, 350, 500, 700, 900)


def checked_pairs(count: int) -> list[tuple[world.Identity, str, int]]:
    """Subjects kept for checking, each with its place, and a number of its own."""
    rng, found, number = np.random.default_rng([12, 0]), [], SEED
    while len(found) < count:
        number += 1
        if subjects.for_checking(idn := world.identity(number)):
            found.append((idn, str(rng.choice(list(world.BACKGROUNDS))), number))
    return found


@torch.no_grad()
def worth(path: Path, count: int) -> dict[int, tuple[float, float, float]]:
    """The errors at each timestep: of the UNet alone, with the subject's picture, with another subject's."""
    from ..core.ezigen.host.layers import UNet, new_adapter
    from .narrow import load_narrow
    from .networks import token_ids

    narrow = load_narrow()
    adapter = new_adapter(narrow.model.model)
    adapter.load(read_adapter(path).tensors)
    network, bare_network = (UNet(narrow.model.model, part) for part in (adapter, None))
    chosen = checked_pairs(count)
    scenes = np.stack([world.render(idn, place, number)[0] for idn, place, number in chosen])
    alone = [world.render(idn, "studio", number + SEED) for idn, _, number in chosen]
    pictures, masks = (np.stack(part) for part in zip(*alone, strict=True))
    z = latents_of(narrow.vae, scenes, None, 0).float()
    cut_out = latents_of(narrow.vae, pictures, masks, 0).float()
    captions = [world.caption(idn, place, ("color", "background")) for idn, place, _ in chosen]
    context = narrow.text(narrow.text.rows_of(token_ids(narrow.tokenizer, captions)))
    about = torch.cat([narrow.encode(subject_prompt(idn.cls)) for idn, _, _ in chosen])
    generator = torch.Generator().manual_seed(0)
    features = subject_features(network, cut_out, about, torch.randn(z[:1].shape, generator=generator).expand_as(z))
    own, other = (batch_tokens([part.roll(shift, 0) for part in features], [1] * len(z)) for shift in (0, 1))
    noise = torch.randn(z.shape, generator=generator)

    def errors(timestep: int) -> tuple[float, float, float]:
        times = torch.full((len(z),), timestep)
        x = at_timestep(z, noise, network.alphas_cumprod[times])
        asked = [bare_network.predicted_noise(x, times, context, own)]
        asked += [network.predicted_noise(x, times, context, tokens) for tokens in (own, other)]
        bare, with_own, with_other = (float((found - noise).square().mean()) for found in asked)
        return bare, with_own, with_other

    return {timestep: errors(timestep) for timestep in TIMESTEPS}


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="run.py check")
    parser.add_argument("--adapter", type=Path, default=assets.ASSETS / "adapter.safetensors")
    parser.add_argument("--subjects", type=int, default=128)
    options = parser.parse_args(arguments)
    training.start()
    comfyui.prepare()
    found = worth(options.adapter, options.subjects)
    mean = tuple(sum(row) / len(found) for row in zip(*found.values(), strict=True))
    for name, row in [*found.items(), ("mean", mean)]:
        log(f"{name}: alone {row[0]:.4f}, with the subject {row[1]:.4f}, with another {row[2]:.4f}")
