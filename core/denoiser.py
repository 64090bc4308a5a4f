"""The one view that a method has of a diffusion model: ComfyUI's coordinates (x, sigma, denoised).

Here x = x0 + sigma * eps for eps- and v-prediction models (x = z_t / sqrt(alpha_bar_t) in the papers' notation, sigma =
sqrt((1 - alpha_bar_t) / alpha_bar_t)) and x = (1 - sigma) * x0 + sigma * eps for flow models. D(x, sigma, c) is the
model's estimate of x0. For all of them

    eps_theta - eps = (x0 - D) / sigma        (for flow models: v_theta - v)

so a loss on the predicted noise needs neither the prediction type nor alpha_bar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """What an algorithm may ask of a model. Differentiable in x and in context."""

    sigmas: Tensor
    """[T] float32, ascending: the noise level of the integer timestep t = 0 .. T-1."""

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy sample of x0 [B, C, h, w] at noise level sigma [B]."""
        ...

    def denoised(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """D(x, sigma, context): x [B, C, h, w], sigma [B], context [B or 1, rows, width]."""
        ...


class PlacedDenoiser(Denoiser, Protocol):
    """A Denoiser that can also be told a vector of the prompt and which part of an image it is looking at."""

    def denoised(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """As in Denoiser; pooled [1, width] of the prompt (SDXL), boxes [B, 4] as y0, x0, y1, x1 in cells."""
        ...


@dataclass(frozen=True)
class Prompt:
    """What the text encoder says: rows [1, n, d], and for SDXL a vector [1, p]."""

    context: Tensor
    pooled: Tensor | None = None


def noise_error(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, **more: Tensor | None
) -> tuple[Tensor, Tensor]:
    """eps_theta(x_t, t, context) - eps, and the denoised estimate it came from; both [B, C, h, w].

    more: pooled and boxes, for a PlacedDenoiser.
    """
    x = denoiser.noised(x0, noise, sigma)
    denoised = denoiser.denoised(x, sigma, context, **more)
    return (x0 - denoised) / sigma.view(-1, *[1] * (x0.ndim - 1)), denoised


def predicted_noise(denoiser: Denoiser, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """eps(x, sigma, c) = (x - D) / sigma for x [B, C, h, w] and one level sigma > 0."""
    return (x - denoiser.denoised(x, sigma.expand(x.shape[0]), context)) / sigma


def rescaled(x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """x of level `sigma` in the scale of level `to`: what a VP latent does when its timestep is relabelled."""
    return x * ((1 + to**2) / (1 + sigma**2)).sqrt()


def timestep_range(count: int, start_percent: float, end_percent: float) -> tuple[int, int]:
    """The integer timesteps (lowest, highest) that a window of the sampling process covers.

    Percent 0 is pure noise (t = count - 1), percent 1 the finished image (t = 0), as everywhere in ComfyUI.
    Raises ValueError when the window is empty or leaves 0..1.
    """
    if not 0.0 <= start_percent < end_percent <= 1.0:
        raise ValueError(
            f"The window {start_percent} to {end_percent} is not a part of 0 to 1: give a start below the end, both "
            f"in 0..1."
        )
    last = count - 1
    return round(last * (1.0 - end_percent)), round(last * (1.0 - start_percent))


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of error [B, C, h, w] over the elements where mask [B, 1, h, w] is 1 (over all of them without a mask)."""
    if mask is None:
        return error.mean()
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """An image mask [B, H, W] in 0..1 as a binary mask [B, 1, height, width] at latent resolution.

    A latent cell belongs to the subject when half of its area does. Where that leaves nothing of a thin subject, any
    touched cell counts. Raises ValueError for a mask without a single set pixel.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if not bool((mask > 0.5).flatten(1).any(1).all()):
        raise ValueError("The mask is empty: paint the subject (white) or disconnect the mask.")
    size = (height, width)
    area = (torch.nn.functional.interpolate(mask, size=size, mode="area") >= 0.5).float()
    touched = (torch.nn.functional.adaptive_max_pool2d(mask, size) > 0.5).float()
    found = area.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(found, area, touched)
