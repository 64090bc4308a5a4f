"""HiFi Tuner (Wang et al. 2023, arXiv 2312.00079), eq. 6 and Algorithm 1: rows of text for a subject, held to the empty
prompt, and refined for each denoising step.

    argmin_c || M (eps_theta(x_t, t, [c, c_s]) - eps) ||^2 + w_s || c_s - phi_s ||^2          (eq. 6)

c_s are the last n rows of the prompt, as in HiPer (hiper.py); M is the subject's mask at latent resolution; phi_s are
the last n rows of the empty prompt, where c_s also starts. After one c_s for all timesteps, Algorithm 1 walks the T
denoising steps from the noisiest on: each takes over the rows of the step before and refines them at exactly its own
noise level, so that a prompt has rows of its own at every step.

There is no public code. What the paper leaves open, each with our choice:
- w_s: 0.01, with both terms as means (over the masked elements, and over the n x d numbers);
- Adam's moments start anew at every step of Algorithm 1, as in null-text optimisation; its rate is that of eq. 6;
- eq. 6's second term holds in Algorithm 1 too, with the same phi_s.
An option pulls c_s towards phi_s outside of the gradient, c_s <- c_s - lr w_s (c_s - phi_s), as AdamW does with its
weight decay: Adam rescales gradients, so a term in the loss holds less than its weight says.
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
STEPS = 1000  # of eq. 6, before Algorithm 1


@dataclass(frozen=True)
class Anchor:
    """phi_s [n, d] and how strongly it holds. decoupled: outside of the gradient."""

    rows: Tensor
    weight: float = WEIGHT
    decoupled: bool = False

    def term(self, c_s: Tensor) -> Tensor:
        """w_s || c_s - phi_s ||^2, as a mean; 0 when it is decoupled."""
        weight = 0.0 if self.decoupled else self.weight
        return weight * (c_s - self.rows.to(c_s)).square().mean()

    def pull(self, c_s: Tensor, learning_rate: float) -> None:
        """The decoupled form, after an optimiser step."""
        if self.decoupled:
            with torch.no_grad():
                c_s.lerp_(self.rows.to(c_s), learning_rate * self.weight)


class AnchoredHiPer(HiPer):
    """Eq. 6 over all timesteps: HiPer's optimisation with the second term."""

    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        context: Tensor,
        start: Tensor,
        settings: HiPerSettings,
        anchor: Anchor,
        mask: Tensor | None = None,
    ) -> None:
        """As HiPer."""
        super().__init__(denoiser, x0, context, start, settings, mask)
        self.anchor = anchor

    def loss(self, index: int, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        loss, denoised = super().loss(index, t, noise)
        return loss + self.anchor.term(self.h), denoised

    def update(self) -> Tensor:
        denoised = super().update()
        self.anchor.pull(self.h, self.settings.learning_rate)
        return denoised


@dataclass(frozen=True)
class StepWiseSettings:
    """What decides the result of Algorithm 1, next to the model, the images, the prompt and c_s."""

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
        anchor: Anchor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """x0, context and mask as for HiPer; start [n, d] the rows of eq. 6; sigmas the T noise levels, falling."""
        self.denoiser, self.x0, self.context, self.mask, self.settings = denoiser, x0, context, mask, settings
        self.sigmas, self.anchor = list(sigmas), anchor
        self.finished: list[Tensor] = []
        self.losses: list[float] = []
        self._take_over(start.to(device=x0.device, dtype=torch.float32))

    @property
    def step(self) -> int:
        return len(self.losses)

    def _take_over(self, rows: Tensor) -> None:
        """Begin a denoising step with the rows of the one before, and a fresh Adam."""
        self.c_s = rows.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.c_s], lr=self.settings.learning_rate)

    def draw(self) -> tuple[int, Tensor]:
        """Image index and noise [1, C, h, w] of the next update."""
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
        if self.anchor is not None:
            loss = loss + self.anchor.term(self.c_s)
        value = finite_or_raise(loss, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite_or_raise(torch.as_tensor(self.c_s.grad).square().sum(), self.step, "gradient")
        self.optimizer.step()
        if self.anchor is not None:
            self.anchor.pull(self.c_s, self.settings.learning_rate)
        self.losses.append(value)
        if self.step % self.settings.inner_steps == 0 and len(self.finished) < len(self.sigmas):
            self.finished.append(self.c_s.detach().clone())
            self._take_over(self.c_s)
        return denoised.detach()

    def rows(self) -> Tensor:
        """[T, n, d] on the CPU; steps that were not reached have the rows of the last one that was."""
        missing = [self.c_s.detach()] * (len(self.sigmas) - len(self.finished))
        return torch.stack([*self.finished, *missing]).cpu()

    def state(self) -> dict[str, Tensor]:
        return {
            "rows": torch.stack([*self.finished, self.c_s.detach()]).cpu(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **adam_state(self.optimizer),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        *finished, current = state["rows"].to(self.c_s).unbind()
        self.finished = [rows.clone() for rows in finished]
        self._take_over(current)
        self.losses = state["losses"].tolist()
        restore_adam(self.optimizer, state)
