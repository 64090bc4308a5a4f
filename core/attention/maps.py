"""Cross-attention probabilities softmax(Q K^T / sqrt(d)) of a prompt's tokens, and maps of them over the image.

Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626, section 3) and HiFi Tuner (arXiv 2312.00079, figure 3) show the
probabilities of one token over the image, averaged over heads and layers. Deviations, each with its reason: all
cross-attention layers count, not only those of 16 x 16 cells, because latents of other sizes may have no such layer;
each map is resized to the latent first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 2**26  # numbers held at a time in column_probabilities()


def probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """[B, heads, T, N] in float32, from image queries [B, T, heads * d] and prompt keys [B, N, heads * d]."""
    q, k = (each.float().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def column_probabilities(
    q: Tensor, k: Tensor, columns: slice, mask: Tensor | None = None, scale: float | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Some queries at a time, and their probabilities [B, heads, n, columns] in float32 of a layer whose keys are more
    than the prompt's. q [B, heads, T, d], k [B, heads, N, d], mask [B, heads, T, N] (or 1 of them) added to the scores.
    The scores of all queries would be gigabytes.
    """
    k = k.float().mT * (scale or q.shape[-1] ** -0.5)
    step = max(1, SCORES // (k.shape[0] * k.shape[1] * k.shape[-1]))
    for begin in range(0, q.shape[2], step):
        part = slice(begin, begin + step)
        scores = q[:, :, part].float() @ k
        if mask is not None:
            scores += mask[:, :, part if mask.shape[2] > 1 else slice(None)]
        yield part, scores.softmax(-1)[..., columns]


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
