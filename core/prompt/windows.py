"""A different conditioning for each sampling step: entries whose time windows meet between two steps.

ComfyUI evaluates every entry whose window contains the current noise level, both ends included, and averages them; if
no window contains it, the prediction is silently zero. So the windows tile the whole process, with cuts between the
steps' noise levels: every sampler, including those that evaluate between steps, then uses exactly one window. The cut
is slightly below the geometric mean of two levels, where some samplers (dpm_2) evaluate, so that such an evaluation
uses the window of its own step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Conditioning = list[list[Any]]
TOLERANCE = 1e-4  # relative to sigma; neighbouring timesteps are at least 30 times as far apart
LOWER = 0.45  # position of a cut from the lower level to the higher, in log sigma
PercentRange = tuple[float, float]  # start and end in percent of the sampling, 0 is pure noise


@dataclass(frozen=True)
class SigmaRange:
    """Noise levels: low < sigma <= high."""

    high: float
    low: float

    def holds(self, sigma: float) -> bool:
        return self.low * (1 + TOLERANCE) < sigma <= self.high * (1 + TOLERANCE)


def windows(sigmas: Sequence[float], sigma_of: Callable[[float], float]) -> list[PercentRange]:
    """A window for each of the T steps of sigmas [T + 1], descending; the last may be 0.

    sigma_of(percent) is the model's decreasing map from percent to noise level.
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
    """Each entry once per step, with that step's token embeddings [1, n, d], in the intersection of both windows.

    rows: one whole prompt per step. Entries whose window does not overlap a step's window are dropped there.
    """
    entries: Conditioning = []
    for _, options in conditioning:
        start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
        for context, (first, last) in zip(rows, steps, strict=True):
            begin, stop = max(start, first), min(end, last)
            if begin < stop:
                entries.append([context, {**options, "start_percent": begin, "end_percent": stop}])
    return entries
