"""The interface between a method and a diffusion model, in ComfyUI's coordinates (x, sigma, denoised).

Here x = x0 + sigma * eps for eps- and v-prediction models (x = z_t / sqrt(alpha_bar_t) in the papers' notation, sigma =
sqrt((1 - alpha_bar_t) / alpha_bar_t)) and x = (1 - sigma) * x0 + sigma * eps for flow models. D(x, sigma, c) is the
model's estimate of x0. It is linear in the network's output F, noise or a velocity: D = a(sigma) x - s(sigma) F. So

    F - F* = (x0 - D) / s(sigma)        (F* gives D = x0; eps and flow models: s = sigma and F - F* = eps_theta - eps)

and a loss on the network's own output, which is what the model was trained with, needs s(sigma) alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Noised = Callable[[Tensor, Tensor, Tensor], Tensor]  # Denoiser.noised()


class Denoiser(Protocol):
    """The model as an algorithm sees it. Differentiable in x and in context."""

    sigmas: Tensor
    """[T] float32, ascending: the noise level at each integer timestep t = 0 .. T-1."""

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, C, h, w] with noise added at noise level sigma [B]."""
        ...

    def denoised(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """D(x, sigma, context): x [B, C, h, w], sigma [B], context [B or 1, tokens, width].

        That of a session also takes a pooled prompt vector, pooled [1, width] (SDXL), and the position of each sample
        within a larger image, boxes [B, 4] as y0, x0, y1, x1 in latent cells.
        """
        ...

    def output_scale(self, sigma: Tensor) -> Tensor:
        """s(sigma) [B]: what an error of 1 in the network's output makes of D."""
        ...


@dataclass(frozen=True)
class Prompt:
    """The text encoder's output: token embeddings [1, n, d] and, for SDXL, a pooled vector [1, p]."""

    context: Tensor
    pooled: Tensor | None = None


def output_error(
    denoiser: Denoiser, x0: Tensor, noise: Tensor, sigma: Tensor, context: Tensor, **more: Tensor | None
) -> tuple[Tensor, Tensor]:
    """F(x_t, t, context) - F*, of eps models eps_theta - eps, and the denoised estimate it is computed from; both
    [B, C, h, w].

    more: pooled and boxes, for the denoiser of a session.
    """
    x = denoiser.noised(x0, noise, sigma)
    denoised = denoiser.denoised(x, sigma, context, **more)
    return (x0 - denoised) / denoiser.output_scale(sigma).view(-1, *[1] * (x0.ndim - 1)), denoised


def predicted_noise(denoiser: Denoiser, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """eps(x, sigma, c) = (x - D) / sigma for x [B, C, h, w] and a single noise level sigma > 0."""
    return (x - denoiser.denoised(x, sigma.expand(x.shape[0]), context)) / sigma


def variance(noised: Noised, sigma: Tensor) -> Tensor:
    """Variance of noised latents whose own is 1: 1 + sigma^2, or (1 - sigma)^2 + sigma^2 in flow models."""
    one, zero, level = torch.ones(1, 1, 1, 1).to(sigma), torch.zeros(1, 1, 1, 1).to(sigma), sigma.view(1)
    image, noise = noised(one, zero, level), noised(zero, one, level)
    return (image**2 + noise**2).view(sigma.shape)


def relabelled(noised: Noised, x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """x at level `sigma`, rescaled to the variance of level `to`: x / sqrt(variance) is the same at both."""
    return x * (variance(noised, to) / variance(noised, sigma)).sqrt()


def rescaled(x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """x at level `sigma`, rescaled to level `to`: what relabelling its timestep does to a VP latent."""
    return x * ((1 + to**2) / (1 + sigma**2)).sqrt()


def timestep_range(count: int, start_percent: float, end_percent: float) -> tuple[int, int]:
    """The integer timesteps (lowest, highest) covered by a window of the sampling process.

    Percent 0 is pure noise (t = count - 1), percent 1 the finished image (t = 0), as everywhere in ComfyUI.
    Raises ValueError when the window is empty or outside 0..1.
    """
    if not 0.0 <= start_percent < end_percent <= 1.0:
        raise ValueError(
            f"The window {start_percent} to {end_percent} is not a part of 0 to 1: give a start below the end, both "
            f"in 0..1."
        )
    last = count - 1
    return round(last * (1.0 - end_percent)), round(last * (1.0 - start_percent))


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of error [B, C, h, w] over the elements where mask [B, 1, h, w] is 1; over all of them without a mask."""
    if mask is None:
        return error.mean()
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resample an image mask [B, H, W] in 0..1 to a binary mask [B, 1, height, width] at latent resolution.

    A latent cell is set when at least half of its area is. If a subject is too thin for that, every cell it touches is
    set. Raises ValueError for a mask without a single set pixel.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    if not bool((mask > 0.5).flatten(1).any(1).all()):
        raise ValueError("The mask is empty: paint the subject (white) or disconnect the mask.")
    size = (height, width)
    area = (torch.nn.functional.interpolate(mask, size=size, mode="area") >= 0.5).float()
    touched = (torch.nn.functional.adaptive_max_pool2d(mask, size) > 0.5).float()
    covered = area.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(covered, area, touched)
