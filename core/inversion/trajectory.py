"""The LIKENESS_TRAJECTORY: the latents of an inversion, with the metadata needed to use them."""

from dataclasses import dataclass, field
from typing import Any

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
        levels = f"{self.steps} steps, noise levels {float(self.sigmas[0]):.4g} to {float(self.sigmas[-1]):.4g}"
        if self.error is None:
            return levels
        return (
            f"{levels}\n"
            f"sampled again without guidance, the image's latent is missed by {100 * self.error:.2g} % of its size"
        )
