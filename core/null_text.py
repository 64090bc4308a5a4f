"""Null-text inversion (Mokady et al. 2023, arXiv 2211.09794), eq. 3: argmin_u || x*_(i+1) - x_(i+1)(x_i, u, c) ||^2.

Guided sampling does not come back along the trajectory of an inversion, because the guidance multiplies every error.
So for each step i of T an unconditional embedding u_i of its own is optimised, starting from the one before, until the
guided step meets the trajectory (the pivot). Model and prompt stay as they are.

Source: NullInversion of the authors' notebook. Their loss is a mean over latents of variance 1 (VP); in ComfyUI's
coordinates these are x / sqrt(1 + sigma^2), so the loss here is divided by 1 + sigma^2 and their constants hold.
Deviations, each with its reason:
- everything but the network is in float32, whatever the model computes in: the loss is about 1e-5;
- `patience`: a step whose loss keeps rising is left with the best embedding it had; 0 is theirs, which keeps the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser
from .fitting import adam_state, finite_or_raise, restore_adam
from .inversion import predicted_noise

CFG = 7.5
INNER_STEPS = 10
LEARNING_RATE = 1e-2
DECAY = 100.0  # the learning rate of step i is LEARNING_RATE * (1 - i / DECAY)
EPSILON = 1e-5
EPSILON_GROWTH = 2e-5  # a step ends when its loss is below EPSILON + i * EPSILON_GROWTH


@dataclass(frozen=True)
class NullTextSettings:
    """What decides the result, next to the trajectory and the prompts."""

    cfg: float = CFG
    inner_steps: int = INNER_STEPS
    learning_rate: float = LEARNING_RATE
    epsilon: float = EPSILON
    patience: int = 0


class NullText:
    """The optimisation of one embedding for each step; a Fit (see fitting.py) whose updates are the inner ones."""

    def __init__(
        self,
        denoiser: Denoiser,
        trajectory: Tensor,
        sigmas: Tensor,
        context: Tensor,
        null: Tensor,
        settings: NullTextSettings,
    ) -> None:
        """trajectory [T + 1, B, C, h, w] and sigmas [T + 1] as invert() has them, on the model's device; context
        [1, n, d] of the prompt, null [1, n, d] of the empty one."""
        self.denoiser, self.trajectory, self.settings = denoiser, trajectory, settings
        self.sigmas, self.context = sigmas.to(trajectory), context
        self.nulls: list[Tensor] = []  # finished, [1, n, d] each
        self.counts: list[int] = [0]  # inner updates of each step, the current one last
        self.losses: list[float] = []
        self.x = trajectory[0]
        self._start(null)

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def done(self) -> bool:
        """Whether every step has its embedding."""
        return len(self.nulls) == len(self.sigmas) - 1

    def _start(self, null: Tensor) -> None:
        """Begin the next sampling step from this embedding, with a fresh Adam."""
        self.u = null.detach().float().clone().requires_grad_(True)
        rate = self.settings.learning_rate * (1 - len(self.nulls) / DECAY)
        self.optimizer = torch.optim.Adam([self.u], lr=rate)
        self.best, self.best_loss, self.worse = self.u.detach().clone(), float("inf"), 0
        self._eps_c: Tensor | None = None

    def next_x(self, u: Tensor) -> Tensor:
        """The latent after the current step, guided against u."""
        i = len(self.nulls)
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if self._eps_c is None:  # the same for all inner updates of a step
            with torch.no_grad():
                self._eps_c = predicted_noise(self.denoiser, self.x, sigma, self.context)
        eps_u = predicted_noise(self.denoiser, self.x, sigma, u)
        return self.x + (following - sigma) * (eps_u + self.settings.cfg * (self._eps_c - eps_u))

    def update(self) -> Tensor:
        i = len(self.nulls)
        x = self.next_x(self.u)
        loss = ((x - self.trajectory[i + 1]).float().square() / (1 + self.sigmas[i + 1] ** 2)).mean()
        value = finite_or_raise(loss, self.step)
        before = self.u.detach().clone()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite_or_raise(torch.as_tensor(self.u.grad).square().sum(), self.step, "gradient")
        self.optimizer.step()
        self.losses.append(value)
        self.counts[-1] += 1
        if value < self.best_loss:
            self.best, self.best_loss, self.worse = before, value, 0
        else:
            self.worse += 1
        if self._finished(value, i):
            self._finish()
        return x.detach()

    def _finished(self, value: float, i: int) -> bool:
        patience = self.settings.patience
        enough = value < self.settings.epsilon + i * EPSILON_GROWTH
        return enough or self.counts[-1] >= self.settings.inner_steps or bool(patience) and self.worse >= patience

    def _finish(self) -> None:
        """Keep the step's embedding and walk on from the latent that it really leads to, not from the pivot."""
        kept = self.best if self.settings.patience and self.worse else self.u.detach()
        with torch.no_grad():
            self.x = self.next_x(kept)
        self.nulls.append(kept.clone())
        if not self.done:
            self.counts.append(0)
            self._start(kept)

    def state(self) -> dict[str, Tensor]:
        return {
            "nulls": torch.cat([*self.nulls, self.u.detach()]).cpu(),
            "best": self.best.cpu(),
            "best_loss": torch.tensor([self.best_loss, float(self.worse)], dtype=torch.float64),
            "x": self.x.detach().cpu(),
            "counts": torch.tensor(self.counts),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **adam_state(self.optimizer),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        *finished, current = state["nulls"].to(self.u).split(1)
        self.nulls = finished
        self._start(current)
        self.best, self.x = state["best"].to(self.u), state["x"].to(self.trajectory)
        self.best_loss, self.worse = float(state["best_loss"][0]), int(state["best_loss"][1])
        self.counts, self.losses = state["counts"].tolist(), state["losses"].tolist()
        restore_adam(self.optimizer, state)
