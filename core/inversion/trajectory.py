"""The LIKENESS_TRAJECTORY: the latents of an inversion, with the metadata needed to use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """latents [T + 1, B, C, h, w] float32 on the CPU, in the model's latent space and ComfyUI's coordinates: entry i is
    a sampler's latent before step i. sigmas [T + 1], descending. header: base, label, prompt (JSON values). error: root
    mean square error of the reconstructed latent, relative to the image's own; None if it was not measured.
    """

    latents: Tensor
    sigmas: Tensor
    header: dict[str, Any] = field(default_factory=dict)
    error: float | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def report(self) -> str:
        """Steps, noise levels and the error."""
        levels = f"{self.steps} steps, noise levels {float(self.sigmas[0]):.4g} to {float(self.sigmas[-1]):.4g}"
        if self.error is None:
            return levels
        return (
            f"{levels}\n"
            f"sampled again without guidance, the image's latent is missed by {100 * self.error:.2g} % of its size"
        )


def check_sigmas(sigmas: Tensor) -> None:
    """ValueError for noise levels that a trajectory cannot have."""
    descending = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas[:-1] > sigmas[1:]).all())
    if not descending or float(sigmas[-1]) < 0 or not bool(torch.isfinite(sigmas).all()):
        raise ValueError(
            f"The SIGMAS are {[round(float(s), 4) for s in sigmas.flatten()[:6]]}{' ...' if sigmas.numel() > 6 else ''}"
            ", expected two or more falling noise levels, as BasicScheduler gives them: do not flip or cut them."
        )
