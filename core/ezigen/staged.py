"""EZIGen's decoupled guidance (Duan et al. 2024, arXiv 2409.08091): layout by text, then appearance by the subject.

The first steps of a sampling run without the adapter and determine the layout; the last `split_ratio` of the steps run
with it. The result is then noised back to the level where the adapter began, and these last steps are repeated until
two consecutive results are similar. For an edit the first result is the source image, and noising is replaced by an
inversion, whose latents preserve the background.

All latents are in ComfyUI's coordinates, x = z + sigma n.

Source: the reference code. Deviations, each with its reason:
- exact noise level: the reference code adds the noise of timestep 1000 * split_ratio but continues as if it were that
  of the first step (400 and 381), which loses 3 % of the contrast in every loop; `published=True` reproduces it;
- exact background: the reference code pastes latents that are two steps noisier than the image, and a noisy one at the
  end; here they have exactly the image's level, and at the end it is the source itself. `published=True` reproduces it;
- inversion of an edit: with any prompt, by default the negative one. The reference code's, 77 times TOKEN without
  positions, needs the text encoder itself (host/staged_edit.py, published_prompt).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_RATIO = 0.4
STEPS, CFG, EDIT_CFG = 50, 7.5, 2.0
MIN_LOOPS, MAX_LOOPS, THRESHOLD = 3, 9, 0.99
NEGATIVE = "dark, blur, defoucus, lack of content, dizzy."  # as published, for the first sampling only
TIMESTEPS = 1000
TOKEN = 7788  # of TF-ICON's "exceptional prompt" (arXiv 2307.12493), 77 times, with which edited images are inverted


def layout_steps(steps: int, split_ratio: float) -> int:
    """The number of first steps without the adapter: (1 - split_ratio) * steps, rounded down."""
    return math.floor((1.0 - split_ratio) * steps + 1e-6)


def split(sigmas: Tensor, split_ratio: float) -> tuple[Tensor, Tensor]:
    """Split a sampling's levels [T + 1] into those of the layout and those of the appearance; they share one level.

    ValueError when one of the two has no step.
    """
    if not 0.0 < split_ratio < 1.0:
        raise ValueError(
            f"The split ratio is {split_ratio:g}: give a part of the steps between 0 and 1, 0.4 as published; at 0 the "
            "subject would never be looked at, at 1 there would be no layout to start from."
        )
    first = layout_steps(len(sigmas) - 1, split_ratio)
    if first == 0:
        raise ValueError(
            f"A split ratio of {split_ratio:g} leaves none of {len(sigmas) - 1} steps for the layout: take more steps, "
            "or a lower ratio."
        )
    return sigmas[: first + 1], sigmas[first:]


def published_factors(sigma: float, published_sigma: float) -> tuple[float, float]:
    """Factors of latent and noise with which a sampler that adds sigma * noise renoises as the reference code: to the
    level of timestep 1000 * split_ratio, published_sigma, which then counts as sigma, the first appearance step's.
    """
    signal = math.sqrt((1 + sigma**2) / (1 + published_sigma**2))
    return signal, signal * published_sigma / sigma


@dataclass(frozen=True)
class Loops:
    """How often the appearance steps are repeated. With least == most the similarity does not matter."""

    least: int = MIN_LOOPS
    most: int = MAX_LOOPS
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(
                f"min_loops is {self.least} and max_loops {self.most}: set min_loops no higher than max_loops."
            )

    def needs_another(self, count: int, similarity: float) -> bool:
        """Whether another loop follows after `count` loops; similarity: of the last two results."""
        return count < self.least or (count < self.most and similarity < self.threshold)


def background_of(trajectory: Sequence[Tensor] | Tensor, step: int, published: bool = False) -> Tensor:
    """The latent of the background after appearance step 0, 1, ..., at the level that the step reaches.

    trajectory: n + 1 latents for n steps, from the source (first) up to the level where the steps begin (last).
    """
    last = len(trajectory) - 1
    return trajectory[last - step] if published else trajectory[last - 1 - step]


def published_levels(table: Tensor, steps: int) -> Tensor:
    """The inversion levels of the reference code: of timesteps 0, 20, 40, ... 500, 519, ... for 50 steps.

    table [T]: the level of every timestep. The last level is left out, as the reference code never reaches it.
    """
    timesteps = torch.linspace(0, len(table) - 1, steps + 1, dtype=torch.float64).round().long()[:-1]
    return table[timesteps.to(table.device)]


def paste(x: Tensor, background: Tensor, mask: Tensor) -> Tensor:
    """x where the mask [B or 1, 1, h, w] is 1, the background where it is 0, a linear blend in between."""
    return mask * x + (1 - mask) * background


@torch.no_grad()
def invert_with_solver(predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, sigmas: Tensor) -> list[Tensor]:
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), second order, run upwards: latents at every level of sigmas.

    predict(x, sigma) -> predicted noise; z: the latent at sigmas[0] > 0; sigmas ascend. The first step is first order.
    With a = 1 / sqrt(1 + sigma^2) the paper's latents are a x; in these, with h = lambda' - lambda and
    lambda = -log sigma,  x' = (s' a' / (s a)) x - a' (e^-h - 1) (x0 + (x0 - x0_before) h / (2 h_before)).
    """
    x, latents = z, [z]
    previous: tuple[Tensor, Tensor] | None = None  # x0 and h of the previous step
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = x - sigma * predict(x, sigma)
        h = sigma.log() - following.log()
        towards = x0 if previous is None else x0 + (x0 - previous[0]) * (h / (2 * previous[1]))
        x = (following / sigma) * x - torch.expm1(-h) * towards
        previous = (x0, h)
        latents.append(x)
    return latents
