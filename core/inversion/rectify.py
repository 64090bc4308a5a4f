"""Rectifying a sampling: the prediction with which the next step lands on a given latent.

Direct inversion (Ju et al. 2023, arXiv 2310.01506, Algorithm 1) adds to the source image's latent, after each step,
what the step missed of the inverted trajectory. A sampler owns its latents, a model only its predictions; but an Euler
step is x' = x + (sigma' - sigma) (x - D) / sigma, so the latent that it reaches can be chosen by D.

Other samplers: D makes the straight line from (x, sigma) through the target at sigma' the one that they follow. Those
that evaluate on the way (dpm_2) still land; those that mix several evaluations (heun, dpmpp_2m, ancestral ones) come
near in every step, and land at the end where their step to level 0 takes D as it is (not uni_pc, dpm_fast,
dpm_adaptive and dpmpp_3m_sde, which end near it).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

CLOSE = 1e-4  # relative: levels nearer than this are the same


def landing(x: Tensor, sigma: float, target: Tensor, following: float) -> Tensor:
    """The denoised prediction D at (x, sigma), in any shape, whose Euler step to level `following` gives target."""
    return x - sigma * (target - x) / (following - sigma)


def step_at(sigma: float, levels: Sequence[float]) -> int | None:
    """The step i of falling levels that an evaluation at sigma belongs to, levels[i] >= sigma > levels[i + 1]; None
    outside.
    """
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if low * (1 + CLOSE) < sigma <= high * (1 + CLOSE):
            return step
    return None
