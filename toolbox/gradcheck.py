"""Is a gradient right? Compare it with finite differences along a random direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientCheck:
    """The slope of a function along one direction, by backward and by central differences."""

    name: str
    analytic: float
    numeric: float

    @property
    def relative_error(self) -> float:
        return abs(self.analytic - self.numeric) / max(abs(self.numeric), 1e-12)


def gradient_check(name: str, function: Callable[[Tensor], Tensor], point: Tensor, seed: int = 0) -> GradientCheck:
    """Check d function / d point for a scalar function of one tensor.

    The direction is the gradient's own plus as much noise, so that the slope is large against float32's rounding and a
    wrong gradient cannot hide. Of several step sizes the one counts where two neighbouring slopes agree best: too long
    a step sees curvature, too short a one sees rounding.
    """
    leaf = point.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed)).to(point)
    direction = gradient / gradient.norm().clamp_min(1e-20) + noise / noise.norm()
    direction = direction / direction.norm()
    analytic = float((gradient.double() * direction.double()).sum())
    scale = float(point.detach().norm()) or 1.0
    slopes = []
    with torch.no_grad():
        for relative in (0.03, 0.01, 0.003, 0.001, 0.0003):
            h = relative * scale
            ahead, behind = function(point + h * direction).double(), function(point - h * direction).double()
            slopes.append(float((ahead - behind) / (2 * h)))
    best = min(range(1, len(slopes)), key=lambda i: abs(slopes[i] - slopes[i - 1]))
    return GradientCheck(name, analytic, slopes[best])
