"""Cross-attention probabilities softmax(Q K^T / sqrt(d)) of a prompt's tokens, and maps of them over the image.

Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626, section 3) and HiFi Tuner (arXiv 2312.00079, figure 3) show the
probabilities of one token over the image, averaged over heads and layers. Deviations, each with its reason: all
cross-attention layers count, not only those of 16 x 16 cells, because latents of other sizes may have no such layer;
each map is resized to the latent first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """[B, heads, T, N] in float32, from image queries [B, T, heads * d] and prompt keys [B, N, heads * d]."""
    q, k = (each.float().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def token_maps(attention: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, N, h, w]: the mean over heads of attention [B, heads, h * w, N], as maps of `shape`."""
    return attention.mean(1).transpose(1, 2).unflatten(-1, shape)


def mean_over_layers(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The mean [B, n, *size] of maps [B, n, h, w] of different sizes."""
    resized = [torch.nn.functional.interpolate(each, size=size, mode="bilinear") for each in maps]
    return torch.stack(resized).mean(0)


def normalize_maps(maps: Tensor) -> Tensor:
    """Maps of any shape, scaled to 0..1 together; constant maps become 0."""
    low, high = maps.amin(), maps.amax()
    return (maps - low) / (high - low).clamp(min=1e-12)
