"""Where a prompt's rows are looked at: cross-attention probabilities softmax(Q K^T / sqrt(d)), and images of them.

Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626, section 3) and HiFi Tuner (arXiv 2312.00079, figure 3) show the
probabilities of one row of the prompt over the image, as a mean over heads and layers. Deviations, each with its
reason: all cross-attention layers count, not those of 16 x 16 cells alone, because latents of other sizes may have no
such layer; each is brought to the latent's size first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """[B, heads, T, N] in float32 for queries [B, T, heads * d] of the image and keys [B, N, heads * d] of the
    prompt."""
    q, k = (each.float().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def row_maps(attention: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, N, h, w]: the mean over heads of attention [B, heads, h * w, N], as images of `shape`."""
    return attention.mean(1).transpose(1, 2).unflatten(-1, shape)


def mean_over_layers(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The mean [B, n, *size] of maps [B, n, h, w] of different sizes."""
    resized = [torch.nn.functional.interpolate(each, size=size, mode="bilinear") for each in maps]
    return torch.stack(resized).mean(0)


def stretched(maps: Tensor) -> Tensor:
    """Maps of any shape brought to 0..1 together; what does not vary becomes 0."""
    low, high = maps.amin(), maps.amax()
    return (maps - low) / (high - low).clamp(min=1e-12)
