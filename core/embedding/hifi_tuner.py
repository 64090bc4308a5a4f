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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser, masked_mean, noise_error
from ..fit.fit import adam_state, finite_or_raise, restore_adam, step_generator
from ..prompt.conditioning import with_tail
from .hiper import HiPer, HiPerSettings

WEIGHT = 0.01  # w_s
INNER_STEPS = 10  # I of Algorithm 1
DENOISING_STEPS = 50  # T
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


class RegularizedHiPer(HiPer):
    """Eq. 6 over all timesteps: HiPer's optimisation with the regularizer."""

    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        context: Tensor,
        start: Tensor,
        settings: HiPerSettings,
        regularizer: Regularizer,
        mask: Tensor | None = None,
    ) -> None:
        """As HiPer."""
        super().__init__(denoiser, x0, context, start, settings, mask)
        self.regularizer = regularizer

    def loss(self, index: int, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        loss, denoised = super().loss(index, t, noise)
        return loss + self.regularizer.term(self.h), denoised

    def update(self) -> Tensor:
        denoised = super().update()
        self.regularizer.pull(self.h, self.settings.learning_rate)
        return denoised


@dataclass(frozen=True)
class StepWiseSettings:
    """What determines the result of Algorithm 1, besides the model, the images, the prompt and c_s."""

    inner_steps: int = INNER_STEPS
    learning_rate: float = LEARNING_RATE
    seed: int = 0


class StepWise:
    """Algorithm 1; a Fit (see fit/fit.py) of T x I updates."""

    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        context: Tensor,
        start: Tensor,
        sigmas: Sequence[float],
        settings: StepWiseSettings,
        regularizer: Regularizer | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """x0, context and mask as for HiPer; start [n, d]: the tokens of eq. 6; sigmas: T noise levels, descending."""
        self.denoiser, self.x0, self.context, self.mask, self.settings = denoiser, x0, context, mask, settings
        self.sigmas, self.regularizer = list(sigmas), regularizer
        self.finished: list[Tensor] = []
        self.losses: list[float] = []
        self._begin_step(start.to(device=x0.device, dtype=torch.float32))

    @property
    def step(self) -> int:
        return len(self.losses)

    def _begin_step(self, rows: Tensor) -> None:
        """Begin a denoising step from the tokens of the previous one, with a new Adam state."""
        self.c_s = rows.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.c_s], lr=self.settings.learning_rate)

    def draw(self) -> tuple[int, Tensor]:
        """Image index and noise [1, C, h, w] for the next update."""
        generator = step_generator(self.settings.seed, self.step, "step-wise")
        index = int(torch.randint(self.x0.shape[0], (1,), generator=generator))
        return index, torch.randn(1, *self.x0.shape[1:], generator=generator)

    def update(self) -> Tensor:
        index, noise = self.draw()
        x0 = self.x0[index : index + 1]
        sigma = torch.tensor([self.sigmas[len(self.finished)]]).to(x0)
        error, denoised = noise_error(self.denoiser, x0, noise.to(x0), sigma, with_tail(self.context, self.c_s))
        mask = None if self.mask is None else self.mask[index % self.mask.shape[0]][None]
        loss = masked_mean(error.float().square(), mask)
        if self.regularizer is not None:
            loss = loss + self.regularizer.term(self.c_s)
        value = finite_or_raise(loss, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite_or_raise(torch.as_tensor(self.c_s.grad).square().sum(), self.step, "gradient")
        self.optimizer.step()
        if self.regularizer is not None:
            self.regularizer.pull(self.c_s, self.settings.learning_rate)
        self.losses.append(value)
        if self.step % self.settings.inner_steps == 0 and len(self.finished) < len(self.sigmas):
            self.finished.append(self.c_s.detach().clone())
            self._begin_step(self.c_s)
        return denoised.detach()

    def rows(self) -> Tensor:
        """The tokens [T, n, d] on the CPU; steps not reached yet have those of the current one."""
        remaining = [self.c_s.detach()] * (len(self.sigmas) - len(self.finished))
        return torch.stack([*self.finished, *remaining]).cpu()

    def state(self) -> dict[str, Tensor]:
        return {
            "rows": torch.stack([*self.finished, self.c_s.detach()]).cpu(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **adam_state(self.optimizer),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        *finished, current = state["rows"].to(self.c_s).unbind()
        self.finished = [rows.clone() for rows in finished]
        self._begin_step(current)
        self.losses = state["losses"].tolist()
        restore_adam(self.optimizer, state)
