"""One conditioning for each sampling step: entries with windows that meet between two steps.

ComfyUI evaluates every entry whose window holds the current noise level, both ends included, and averages them; where
none holds it, the prediction is zero without a word. So the windows tile the whole process and are cut between the
steps' own levels: every sampler, also one that evaluates between its steps, then finds exactly one of them. Not in the
middle of their logarithms, where some samplers (dpm_2) evaluate, but a little below: such an evaluation belongs to the
step that it is made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Conditioning = list[list[Any]]
TOLERANCE = 1e-4  # of sigma; neighbouring timesteps are 30 times as far apart or more
LOWER = 0.45  # of the way from the lower level to the higher, in logarithms
PercentRange = tuple[float, float]  # start and end in percent of the sampling, 0 pure noise


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels: low < sigma <= high."""

    high: float
    low: float

    def holds(self, sigma: float) -> bool:
        return self.low * (1 + TOLERANCE) < sigma <= self.high * (1 + TOLERANCE)


def windows(sigmas: Sequence[float], sigma_of: Callable[[float], float]) -> list[PercentRange]:
    """A window for each of the T steps of sigmas [T + 1], descending, the last may be 0.

    sigma_of(percent) is the model's own falling map from percent to noise level.
    """
    cuts = [_percent(a**LOWER * b ** (1 - LOWER), sigma_of) for a, b in zip(sigmas[:-2], sigmas[1:-1], strict=True)]
    return list(zip([0.0, *cuts], [*cuts, 1.0], strict=True))


def _percent(sigma: float, sigma_of: Callable[[float], float]) -> float:
    """The percent whose noise level is sigma, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if sigma_of(middle) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def step_wise(conditioning: Conditioning, rows: Sequence[Tensor], steps: Sequence[PercentRange]) -> Conditioning:
    """Each entry once for every step, with that step's rows [1, n, d]; its own window is kept inside the step's.

    rows are for the whole table of a prompt; entries whose window does not meet a step's are left out there.
    """
    found: Conditioning = []
    for _, options in conditioning:
        start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
        for table, (first, last) in zip(rows, steps, strict=True):
            begin, stop = max(start, first), min(end, last)
            if begin < stop:
                found.append([table, {**options, "start_percent": begin, "end_percent": stop}])
    return found


def active(conditioning: Conditioning, sigma: float, sigma_of: Callable[[float], float]) -> Conditioning:
    """The entries that ComfyUI evaluates at a noise level."""
    return [
        entry
        for entry in conditioning
        if sigma_of(entry[1].get("end_percent", 1.0)) <= sigma <= sigma_of(entry[1].get("start_percent", 0.0))
    ]
