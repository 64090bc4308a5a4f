"""Sampling a picture for a preview, with ComfyUI's own sampler."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ..conditioning import Conditioning

SAMPLER, SCHEDULER = "euler", "ddim_uniform"  # together DDIM with eta 0, which the papers use


def sample_picture(
    model: Any,
    vae: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    shape: tuple[int, ...],
    *,
    steps: int,
    cfg: float,
    seed: int,
) -> Tensor:
    """One picture [1, H, W, 3] in 0..1 from fresh noise of a LATENT's shape [1, C, h, w]. Without a negative
    prompt cfg is 1.
    """
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    latent = torch.zeros(shape)
    if negative is None:
        negative, cfg = positive, 1.0
    samples = comfy.sample.sample(
        model, noise, steps, cfg, SAMPLER, SCHEDULER, positive, negative, latent, disable_pbar=True, seed=seed
    )
    return vae.decode(samples)
