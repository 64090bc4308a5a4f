"""EZIGen's decoupled guidance (Duan et al. 2024, arXiv 2409.08091): layout by text, then appearance by the subject.

The first steps of a sampling run without the adapter and lay the image out; the last `split_ratio` of the steps run
with it. The result is then brought back to the noise level at which the adapter began, and these last steps are done
again, until two results in a row are alike. For an edit the first result is the source image, and the way back up is
an inversion, whose latents hold the background in place.

All latents are in ComfyUI's coordinates, x = z + sigma n.

Source: the authors' code. Deviations, each with its reason:
- exact noise level: theirs adds the noise of timestep 1000 * split_ratio and goes on as if it were that of the first
  step (400 and 381), which takes 3 % of the contrast in every loop; `published=True` is theirs;
- exact background: theirs pastes latents that are two steps noisier than the image, and a noisy one at the end;
  here they are those of the very level, and the source itself at the end. `published=True` is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import rescaled

SPLIT_RATIO = 0.4
STEPS, CFG, EDIT_CFG = 50, 7.5, 2.0
MIN_LOOPS, MAX_LOOPS, THRESHOLD = 3, 9, 0.99
NEGATIVE = "dark, blur, defoucus, lack of content, dizzy."  # as published, of the first sampling only
TIMESTEPS = 1000


def layout_steps(steps: int, split_ratio: float) -> int:
    """How many of the first steps the adapter leaves alone: the whole steps of (1 - split_ratio) * steps."""
    return math.floor((1.0 - split_ratio) * steps + 1e-6)


def appearance_steps(steps: int, split_ratio: float) -> int:
    """How many of the last steps the adapter works in: all but the whole steps of (1 - split_ratio) * steps.

    ValueError when that is none, or all of them.
    """
    if not 0.0 < split_ratio < 1.0:
        raise ValueError(
            f"The split ratio is {split_ratio:g}: give a part of the steps between 0 and 1, 0.4 as published; at 0 the "
            "subject would never be looked at, at 1 there would be no layout to start from."
        )
    layout = layout_steps(steps, split_ratio)
    if layout == 0:
        raise ValueError(
            f"A split ratio of {split_ratio:g} leaves none of {steps} steps for the layout: take more steps, or a "
            "lower ratio."
        )
    return steps - layout


def split(sigmas: Tensor, split_ratio: float) -> tuple[Tensor, Tensor]:
    """The levels [T + 1] of a sampling as those of the layout and those of the appearance; they share one level."""
    first = len(sigmas) - 1 - appearance_steps(len(sigmas) - 1, split_ratio)
    return sigmas[: first + 1], sigmas[first:]


def renoised(z: Tensor, noise: Tensor, sigma: Tensor, published_sigma: Tensor | None = None) -> Tensor:
    """A clean latent at the level of the first appearance step; published_sigma: of timestep 1000 * split_ratio, for
    theirs: what has that level's noise is then said to have this one's.
    """
    if published_sigma is None:
        return z + sigma * noise
    return rescaled(z + published_sigma * noise, published_sigma, sigma)


def published_factors(sigma: float, published_sigma: float) -> tuple[float, float]:
    """For samplers that add sigma x noise to a latent: what to multiply latent and noise with, to have renoised()'s."""
    signal = math.sqrt((1 + sigma**2) / (1 + published_sigma**2))
    return signal, signal * published_sigma / sigma


@dataclass(frozen=True)
class Loops:
    """How often the appearance steps are done again. Equal numbers give that many, whatever the likeness."""

    least: int = MIN_LOOPS
    most: int = MAX_LOOPS
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(
                f"min_loops is {self.least} and max_loops {self.most}: set min_loops no higher than max_loops."
            )

    def go_on(self, done: int, similarity: float) -> bool:
        """Whether another loop follows, after `done` of them of which the last two results are this alike."""
        return done < self.least or (done < self.most and similarity < self.threshold)


def background_of(trajectory: Sequence[Tensor] | Tensor, step: int, published: bool = False) -> Tensor:
    """The latent that holds the background after appearance step 0, 1, ...: of the level that the step came to.

    trajectory: from the source (first) up to the level where the steps begin (last), n + 1 for n steps.
    """
    last = len(trajectory) - 1
    return trajectory[last - step] if published else trajectory[last - 1 - step]


def published_levels(table: Tensor, steps: int) -> Tensor:
    """The levels of theirs that an image is walked up: of timesteps 0, 20, 40, ... 500, 519, ... for 50 steps.

    table [T]: the level of every timestep. The last one is left out, as they never come to it.
    """
    timesteps = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64).round().long()[:-1]
    return table[timesteps.to(table.device)]


def pasted(x: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """x where the mask [B or 1, 1, h, w] is 1, the background where it is 0, both by halves in between."""
    return mask * x + (1 - mask) * background


@torch.no_grad()
def inverted_by_solver(
    predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, sigmas: Tensor, on_step: Callable[[int], None] | None = None
) -> list[Tensor]:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), second order, run upwards: latents at every level of sigmas.

    predict(x, sigma) -> predicted noise; z: the latent at sigmas[0], which is above 0; sigmas ascend. The first step is
    of first order. With a = 1 / sqrt(1 + sigma^2) the latents of the paper are a x; there, with h = lambda' - lambda
    and lambda = -log sigma,  x' = (s' a' / (s a)) x - a' (e^-h - 1) (x0 + (x0 - x0_before) h / (2 h_before)).
    """
    x, found = z, [z]
    before: tuple[Tensor, Tensor] | None = None  # x0 and h of the step before
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = x - sigma * predict(x, sigma)
        h = sigma.log() - following.log()
        towards = x0 if before is None else x0 + (x0 - before[0]) * (h / (2 * before[1]))
        x = (following / sigma) * x - torch.expm1(-h) * towards
        before = (x0, h)
        found.append(x)
        if on_step is not None:
            on_step(step + 1)
    return found
