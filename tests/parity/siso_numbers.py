"""The numbers of SISO's official functions, and how a part of them is taken."""

from __future__ import annotations

import torch

from likeness.core.vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

DINO = Preprocess(518, 518, IMAGENET_MEAN, IMAGENET_STD, published=True)


def part(official: dict, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in official.items() if name.startswith(prefix)}


def picture(official: dict, name: str) -> torch.Tensor:
    """As ComfyUI has images."""
    return official[name].movedim(1, -1)
