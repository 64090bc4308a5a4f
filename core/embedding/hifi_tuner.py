"""HiFi Tuner (Wang et al. 2023, arXiv 2312.00079), eq. 6 and Algorithm 1: token embeddings of a subject, regularized
towards the empty prompt and refined for each denoising step.

    argmin_c || M (eps_theta(x_t, t, [c, c_s]) - eps) ||^2 + w_s || c_s - phi_s ||^2          (eq. 6)

c_s are the last n tokens of the prompt, as in HiPer (hiper.py); M is the subject's mask at latent resolution; phi_s are
the last n tokens of the empty prompt, from which c_s also starts. After learning one c_s for all timesteps, Algorithm 1
goes through the T denoising steps from the noisiest on: each starts from the tokens of the previous step and refines
them at its own noise level, so that every step has its own tokens.

There is no public code. The paper leaves the following open; our choices are:
- w_s: 0.01, with both terms as means (over the masked elements, and over the n x d values);
- Adam's moments are reset at every step of Algorithm 1, as in null-text optimisation; its learning rate is that of
  eq. 6;
- the second term of eq. 6 is used in Algorithm 1 too, with the same phi_s.
An option pulls c_s towards phi_s outside the gradient, c_s <- c_s - lr w_s (c_s - phi_s), like AdamW's weight decay:
Adam rescales gradients, so a term in the loss has less effect than its weight suggests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fit.fit import step_generator
from .hiper import HiPer

WEIGHT = 0.01  # w_s
INNER_STEPS = 10  # I of Algorithm 1
LEARNING_RATE = 5e-3
STEPS = 1000  # updates of eq. 6, before Algorithm 1


@dataclass(frozen=True)
class Regularizer:
    """The second term of eq. 6: phi_s [n, d] as rows, and its weight w_s. decoupled: applied outside the gradient."""

    rows: Tensor
    weight: float = WEIGHT
    decoupled: bool = False

    def term(self, c_s: Tensor) -> Tensor:
        """w_s || c_s - phi_s ||^2, as a mean; 0 when it is decoupled."""
        weight = 0.0 if self.decoupled else self.weight
        return weight * (c_s - self.rows.to(c_s)).square().mean()

    def pull(self, c_s: Tensor, learning_rate: float) -> None:
        """The decoupled form, applied after an optimiser step."""
        if self.decoupled:
            with torch.no_grad():
                c_s.lerp_(self.rows.to(c_s), learning_rate * self.weight)


@dataclass(frozen=True)
class StepWiseSettings:
    """What determines the result of Algorithm 1, besides the model, the images, the prompt and c_s."""

    inner_steps: int = INNER_STEPS
    learning_rate: float = LEARNING_RATE
    seed: int = 0


class StepWise(HiPer):
    """Algorithm 1: T x I updates."""

    def __init__(self, sigmas: Sequence[float], *inputs: Any, **more: Any) -> None:
        """sigmas: T noise levels, descending; inputs, more: as for HiPer, beginning from the tokens of eq. 6."""
        super().__init__(*inputs, **more)
        self.levels, self.finished = torch.tensor(sigmas), list[Tensor]()

    def draw(self) -> tuple[int, Tensor, Tensor]:
        """Image index, denoising step [1] and noise [1, C, h, w] for the next update."""
        generator = step_generator(self.settings.seed, self.step, "step-wise")
        index = int(torch.randint(self.x0.shape[0], (1,), generator=generator))
        noise = torch.randn(1, *self.x0.shape[1:], generator=generator)
        return index, torch.tensor([len(self.finished)]), noise

    def update(self) -> Tensor:
        denoised = super().update()
        if self.step % self.settings.inner_steps == 0 and len(self.finished) < len(self.levels):
            self.finished.append(self.h.detach().clone())
            self.begin(self.h)
        return denoised

    def rows(self) -> Tensor:
        """The tokens [T, n, d] on the CPU; steps not reached yet have those of the current one."""
        remaining = [self.h.detach()] * (len(self.levels) - len(self.finished))
        return torch.stack([*self.finished, *remaining]).cpu()

    def own_state(self) -> dict[str, Tensor]:
        return {"rows": torch.stack([*self.finished, self.h.detach()]).cpu()}

    def restore_own(self, state: dict[str, Tensor]) -> None:
        *finished, current = state["rows"].to(self.h).unbind()
        self.finished = [rows.clone() for rows in finished]
        self.begin(current)
