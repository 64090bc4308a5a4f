"""Latent rectification: the denoised prediction that makes the next sampling step reach a given latent.

Direct inversion (Ju et al. 2023, arXiv 2310.01506, Algorithm 1) corrects the source image's latent after each step by
its deviation from the inverted trajectory. A model controls only its predictions, not the sampler's latents; but an
Euler step is x' = x + (sigma' - sigma) (x - D) / sigma, so D can be chosen such that it reaches any latent.

For other samplers, D defines the straight line from (x, sigma) through the target at sigma'. Samplers that evaluate
within the step (dpm_2) still reach the target; those that combine several evaluations (heun, dpmpp_2m, ancestral ones)
come close in every step, and reach it at the end if their step to level 0 returns D unchanged (uni_pc, dpm_fast,
dpm_adaptive and dpmpp_3m_sde do not, and end close to it).

DirectEdit (Yang and Ye 2026, arXiv 2605.02417) looks at the model instead. An inversion predicted the step from x_i to
x_(i+1) at x_(i+1), the only latent it knew. So on the way back the model is evaluated at x + r_i, r_i = x_(i+1) - x_i,
with the same residual for the image and for its edit, and the image's steps are those of the inversion. Deviation: the
residual is that of x_(i+1) rescaled to the variance of level i, as the label "published" inverts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..denoiser import Noised, relabelled

CLOSE = 1e-4  # relative: noise levels closer than this are equal


def landing_prediction(x: Tensor, sigma: float, target: Tensor, following: float) -> Tensor:
    """The denoised prediction D at (x, sigma), of any shape, whose Euler step to level `following` gives target."""
    return x - sigma * (target - x) / (following - sigma)


def residuals(noised: Noised, latents: Tensor, sigmas: Tensor) -> Tensor:
    """r [T, B, C, h, w] of a trajectory's latents [T + 1, B, C, h, w] along levels sigmas [T + 1]."""
    steps = zip(latents[1:], sigmas[1:], sigmas[:-1], strict=True)
    return torch.stack([relabelled(noised, *step) for step in steps]) - latents[:-1]


def step_at(sigma: float, levels: Sequence[float]) -> int | None:
    """The step i of descending levels that an evaluation at sigma belongs to, levels[i] >= sigma > levels[i + 1]; None
    if there is none.
    """
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if low * (1 + CLOSE) < sigma <= high * (1 + CLOSE):
            return step
    return None
