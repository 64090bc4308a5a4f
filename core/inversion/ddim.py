"""DDIM inversion (Song et al. 2021, arXiv 2010.02502, eq. 13 run backwards): from an image to its initial noise.

With eta 0 a DDIM step is an Euler step in ComfyUI's coordinates, x' = x + (sigma' - sigma) eps(x, sigma), and inversion
goes through the same levels upwards. Implementations differ in where they evaluate eps, because the latent at the
noisier end of the step, which would give the exact inverse, is not known yet:

- published: at the noisier level sigma', for the cleaner latent rescaled to that level's variance, as in null-text
  inversion (Mokady et al. 2023, arXiv 2211.09794) and prompt-to-prompt;
- current: at the latent's own level, like an Euler sampler with flipped sigmas;
- fixed point: published first, then several times for the resulting x' itself; the fixed point is the exact inverse of
  the sampler's step;
- midpoint: halfway between both levels, of second order. The latent there is reached with the prediction of the
  previous step's midpoint (FireFlow, Deng et al. 2024, arXiv 2412.07517), so that a step still takes one evaluation.

For flow models eps - x0 is the velocity, and (x - D) / sigma equals it: the same steps invert the flow ODE.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..denoiser import Denoiser, predicted_noise, relabelled

Label = Literal["published", "current", "fixed point", "midpoint"]
LABELS: tuple[Label, ...] = get_args(Label)
ITERATIONS = 3  # of the fixed point


def invert(
    denoiser: Denoiser,
    x0: Tensor,
    context: Tensor,
    sigmas: Tensor,
    label: Label = "published",
    iterations: int = ITERATIONS,
    on_step: Callable[[Tensor], None] = lambda _x: None,
) -> Tensor:
    """The trajectory [T + 1, B, C, h, w] of x0 [B, C, h, w]: entry i is the latent before step i of sampling `sigmas`.

    sigmas [T + 1] descending, as for a sampler; the last may be 0. context [B or 1, tokens, width] of the prompt that
    describes the image; no guidance. on_step(latent) is called after each step, and may raise to stop.
    """
    sigmas = sigmas.to(x0)
    lowest = denoiser.sigmas[0].to(x0)
    x = x0
    latents, eps = [x], None
    for i in range(len(sigmas) - 2, -1, -1):
        low, high = sigmas[i + 1], sigmas[i]
        if label == "midpoint":
            eps = predicted_noise(denoiser, x, torch.maximum(low, lowest), context) if eps is None else eps
            eps = predicted_noise(denoiser, x + (high - low) / 2 * eps, (low + high) / 2, context)
        else:
            level = torch.maximum(low, lowest) if label == "current" else high
            eps = predicted_noise(denoiser, relabelled(denoiser.noised, x, low, level), level, context)
        following = x + (high - low) * eps
        for _ in range(iterations if label == "fixed point" else 0):
            following = x + (high - low) * predicted_noise(denoiser, following, high, context)
        x = following
        latents.append(x)
        on_step(x)
    return torch.stack(latents[::-1])


def reconstruct(denoiser: Denoiser, x: Tensor, context: Tensor, sigmas: Tensor) -> Tensor:
    """The image's latent that Euler steps along `sigmas` make of the noisiest one, without guidance."""
    for sigma, following in zip(sigmas[:-1].to(x), sigmas[1:].to(x), strict=True):
        x = x + (following - sigma) * predicted_noise(denoiser, x, sigma, context)
    return x
