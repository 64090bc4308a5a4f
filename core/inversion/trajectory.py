"""The LIKENESS_TRAJECTORY: the latents of an inversion, with the metadata needed to use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """latents [T + 1, B, C, h, w] float32 on the CPU, in the model's latent space and ComfyUI's coordinates: entry i is
    a sampler's latent before step i. sigmas [T + 1], descending. header: base, label, prompt (JSON values).
    """

    latents: Tensor
    sigmas: Tensor
    header: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1
