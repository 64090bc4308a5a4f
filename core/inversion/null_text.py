"""Null-text inversion (Mokady et al. 2023, arXiv 2211.09794), eq. 3: argmin_u || x*_(i+1) - x_(i+1)(x_i, u, c) ||^2.

Guided sampling does not come back along the trajectory of an inversion, because the guidance multiplies every error.
So for each step i of T an unconditional embedding u_i of its own is optimised, starting from the one before, until the
guided step meets the trajectory (the pivot). Model and prompt stay as they are.

Source: NullInversion of the authors' notebook. Their loss is a mean over latents of variance 1 (VP); in ComfyUI's
coordinates these are x / sqrt(1 + sigma^2), so the loss here is divided by 1 + sigma^2 and their constants hold.
Deviations, each with its reason:
- everything but the network is in float32, whatever the model computes in: the loss is about 1e-5;
- `patience`: a step whose loss keeps rising is left with the best embedding it had; 0 is theirs, which keeps the last;
- with more than their 50 steps the learning rate falls to one half over all of them; theirs would become negative.

START says where the first embedding begins. Theirs is the empty prompt, whose guidance errors are large: hundreds of
updates. From the prompt's own rows, u = c, guidance changes nothing and only the inversion's own small error is left;
one or two updates for each step then do. Two methods of others need no updates at all:

- negative-prompt inversion (Miyake et al. 2023, arXiv 2305.16807) stays there: u_i = c for every step, so that guided
  sampling is the unguided one, with the inversion's error;
- direct inversion (Ju et al. 2023, arXiv 2310.01506) keeps the empty prompt and puts the latent back on the trajectory
  after each step (rectify.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..denoiser import Denoiser, predicted_noise
from ..fit.fit import adam_state, finite_or_raise, restore_adam, rollback_on_interrupt

Method = Literal["null-text", "negative prompt", "direct"]
METHODS: tuple[Method, ...] = get_args(Method)
Start = Literal["prompt", "empty prompt"]
STARTS: tuple[Start, ...] = get_args(Start)

CFG = 7.5
INNER_STEPS = 10
LEARNING_RATE = 1e-2
DECAY = 100.0  # the learning rate of step i is LEARNING_RATE * (1 - i / DECAY)
NONE = -1.0  # in a stored state: no loss yet
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
    """The optimisation of one embedding for each step; a Fit (see fit/fit.py) whose updates are the inner ones."""

    def __init__(
        self,
        denoiser: Denoiser,
        trajectory: Tensor,
        sigmas: Tensor,
        context: Tensor,
        null: Tensor,
        settings: NullTextSettings,
        unguided: Denoiser | None = None,
    ) -> None:
        """trajectory [T + 1, B, C, h, w] and sigmas [T + 1] as invert() has them, on the model's device; context
        [1, n, d] of the prompt, null [1, n, d] where the first embedding starts. unguided: what predicts for the
        embeddings, when more than its rows distinguishes the negative prompt (a pooled vector).
        """
        self.denoiser, self.trajectory, self.settings = denoiser, trajectory, settings
        self.unguided = unguided or denoiser
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
        slope = max(DECAY, 2.0 * (len(self.sigmas) - 1))
        rate = self.settings.learning_rate * (1 - len(self.nulls) / slope)
        self.optimizer = torch.optim.Adam([self.u], lr=rate)
        self.best, self.best_loss, self.worse = self.u.detach().clone(), float("inf"), 0
        self._eps_c: Tensor | None = None

    def guided_noise(self, u: Tensor) -> Tensor:
        """The predicted noise before the current step, guided against u."""
        i = len(self.nulls)
        sigma = self.sigmas[i]
        if self._eps_c is None:  # the same for all inner updates of a step
            with torch.no_grad():
                self._eps_c = predicted_noise(self.denoiser, self.x, sigma, self.context)
        eps_u = predicted_noise(self.unguided, self.x, sigma, u)
        return eps_u + self.settings.cfg * (self._eps_c - eps_u)

    def next_x(self, eps: Tensor) -> Tensor:
        """The latent after the current step with this noise."""
        i = len(self.nulls)
        return self.x + (self.sigmas[i + 1] - self.sigmas[i]) * eps

    def update(self) -> Tensor:
        i = len(self.nulls)
        eps = self.guided_noise(self.u)
        loss = ((self.next_x(eps) - self.trajectory[i + 1]).float().square() / (1 + self.sigmas[i + 1] ** 2)).mean()
        value = finite_or_raise(loss, self.step)
        before, denoised = self.u.detach().clone(), (self.x - self.sigmas[i] * eps).detach()
        best, best_loss, worse = self.best, self.best_loss, self.worse + 1
        if value < best_loss:
            best, best_loss, worse = before, value, 0
        finished, following = self._finished(value, i, worse), self.x
        with rollback_on_interrupt(self.optimizer):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            finite_or_raise(torch.as_tensor(self.u.grad).square().sum(), self.step, "gradient")
            self.optimizer.step()
            kept = best if self.settings.patience and worse else self.u.detach()
            if finished:  # walk on from the latent that the embedding really leads to, not from the pivot
                with torch.no_grad():
                    following = self.next_x(self.guided_noise(kept))
        self.losses.append(value)
        self.counts[-1] += 1
        self.best, self.best_loss, self.worse = best, best_loss, worse
        if finished:
            self.x = following
            self.nulls.append(kept.clone())
            if not self.done:
                self.counts.append(0)
                self._start(kept)
        return denoised

    def _finished(self, value: float, i: int, worse: int) -> bool:
        """Whether the update under way is the last one of step i."""
        patience = self.settings.patience
        enough = value < self.settings.epsilon + i * EPSILON_GROWTH
        return enough or self.counts[-1] + 1 >= self.settings.inner_steps or bool(patience) and worse >= patience

    def state(self) -> dict[str, Tensor]:
        return {
            "nulls": torch.cat([*self.nulls, self.u.detach()]).cpu(),
            "best": self.best.cpu(),
            "best_loss": torch.tensor([self.best_loss, float(self.worse)], dtype=torch.float64).nan_to_num(posinf=NONE),
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
        best_loss, worse = state["best_loss"].tolist()
        self.best_loss, self.worse = float("inf") if best_loss == NONE else best_loss, int(worse)
        self.counts, self.losses = state["counts"].tolist(), state["losses"].tolist()
        restore_adam(self.optimizer, state)
