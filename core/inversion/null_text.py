"""Null-text inversion (Mokady et al. 2023, arXiv 2211.09794), eq. 3: argmin_u || x*_(i+1) - x_(i+1)(x_i, u, c) ||^2.

Guided sampling does not return along the trajectory of an inversion, because guidance amplifies every error. So for
each step i of T a separate unconditional embedding u_i is optimised, starting from the previous one, until the guided
step matches the trajectory (the pivot). The model and the prompt are not changed.

Source: NullInversion in the authors' notebook. Its loss is a mean over latents of variance 1 (VP); here it is divided
by the variance of the model's noised latents (1 + sigma^2 for eps and v models), so that the constants are the same.
Deviations, each with its reason:
- everything except the network is in float32, whatever the model's dtype: the loss is about 1e-5;
- `patience`: a step whose loss keeps rising ends with its best embedding; 0 is the reference code's behaviour, which
  keeps the last;
- with more than the reference code's 50 steps, the learning rate decays to one half over all steps; there it would
  become negative.

Start selects the first embedding. The paper uses the empty prompt, whose guidance errors are large and take hundreds of
updates. With the prompt's own token embeddings, u = c, guidance has no effect and only the inversion's small error is
left, for which one or two updates per step suffice. Three other methods need no updates at all:

- negative-prompt inversion (Miyake et al. 2023, arXiv 2305.16807) uses u_i = c at every step, so that guided sampling
  equals unguided sampling, with the inversion's error;
- direct inversion (Ju et al. 2023, arXiv 2310.01506) keeps the empty prompt and moves the latent back onto the
  trajectory after each step (rectify.py);
- DirectEdit (Yang and Ye 2026, arXiv 2605.02417) does so too, and evaluates the model at latents moved by the source's
  next step (rectify.py), the edit's as well as the source's.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..denoiser import Denoiser, predicted_noise, variance
from ..fit.fit import Fit, finite_or_raise, random_numbers, rollback_on_interrupt

Method = Literal["null-text", "negative prompt", "direct", "direct edit"]
METHODS: tuple[Method, ...] = get_args(Method)
Start = Literal["prompt", "empty prompt"]
STARTS: tuple[Start, ...] = get_args(Start)

CFG = 7.5
INNER_STEPS = 10
LEARNING_RATE = 1e-2
DECAY = 100.0  # the learning rate of step i is LEARNING_RATE * (1 - i / DECAY)
NONE = -1.0  # stored in place of a loss that does not exist yet
EPSILON = 1e-5
EPSILON_GROWTH = 2e-5  # a step ends when its loss is below EPSILON + i * EPSILON_GROWTH


@dataclass(frozen=True)
class NullTextSettings:
    """What determines the result, besides the trajectory and the prompts."""

    cfg: float = CFG
    inner_steps: int = INNER_STEPS
    learning_rate: float = LEARNING_RATE
    epsilon: float = EPSILON
    patience: int = 0


class NullText(Fit):
    """The optimisation of one embedding per step, whose updates are the inner steps."""

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
        """trajectory [T + 1, B, C, h, w] and sigmas [T + 1] as in invert(), on the model's device; context [1, n, d] of
        the prompt; null [1, n, d]: the initial value of the first embedding. unguided: the denoiser for the embeddings,
        if the negative prompt differs in more than its token embeddings (a pooled vector).
        """
        self.denoiser, self.trajectory, self.settings = denoiser, trajectory, settings
        self.unguided = unguided or denoiser
        self.sigmas, self.context = sigmas.to(trajectory), context
        self.nulls: list[Tensor] = []  # of the finished steps, each [1, n, d]
        self.counts: list[int] = [0]  # inner updates of each step; the last is the current one
        self.losses: list[float] = []
        self.x = trajectory[0]
        self._start(null)

    @property
    def done(self) -> bool:
        return len(self.nulls) == len(self.sigmas) - 1

    def _start(self, null: Tensor) -> None:
        """Begin the next sampling step from this embedding, with a new Adam state."""
        self.u = null.detach().float().clone().requires_grad_(True)
        slope = max(DECAY, 2.0 * (len(self.sigmas) - 1))
        rate = self.settings.learning_rate * (1 - len(self.nulls) / slope)
        self.optimizer = torch.optim.Adam([self.u], lr=rate)
        self.best, self.best_loss, self.worse = self.u.detach().clone(), float("inf"), 0
        self._eps_c: Tensor | None = None

    def guided_noise(self, u: Tensor) -> Tensor:
        """The predicted noise at the current step, with guidance against u."""
        i = len(self.nulls)
        sigma = self.sigmas[i]
        if self._eps_c is None:  # constant during the inner updates of a step
            with torch.no_grad(), random_numbers(i):  # in whichever update it is needed first
                self._eps_c = predicted_noise(self.denoiser, self.x, sigma, self.context)
        eps_u = predicted_noise(self.unguided, self.x, sigma, u)
        return eps_u + self.settings.cfg * (self._eps_c - eps_u)

    def next_x(self, eps: Tensor) -> Tensor:
        """The latent after the current step with predicted noise eps."""
        i = len(self.nulls)
        return self.x + (self.sigmas[i + 1] - self.sigmas[i]) * eps

    def update(self) -> Tensor:
        i = len(self.nulls)
        eps = self.guided_noise(self.u)
        scale = variance(self.denoiser.noised, self.sigmas[i + 1])
        loss = ((self.next_x(eps) - self.trajectory[i + 1]).float().square() / scale).mean()
        value = finite_or_raise(loss, self.step)
        denoised, patience = (self.x - self.sigmas[i] * eps).detach(), self.settings.patience
        best, best_loss, worse = self.best, self.best_loss, self.worse + 1
        if value < best_loss:
            best, best_loss, worse = self.u.detach().clone() if patience else best, value, 0
        limit, following = self.settings.epsilon + i * EPSILON_GROWTH, self.x
        is_last = value < limit or self.counts[-1] + 1 >= self.settings.inner_steps or 0 < patience <= worse
        with rollback_on_interrupt(self, is_last):
            self.descend(loss, self.u)
            null = best if patience and worse else self.u.detach()
            if is_last:  # continue from the latent that the embedding actually leads to, not from the pivot
                with torch.no_grad():
                    following = self.next_x(self.guided_noise(null))
        self.losses.append(value)
        self.counts[-1] += 1
        self.best, self.best_loss, self.worse = best, best_loss, worse
        if is_last:
            self.x = following
            self.nulls.append(null.clone())
            if not self.done:
                self.counts.append(0)
                self._start(null)
        return denoised

    def own_state(self) -> dict[str, Tensor]:
        return {
            "nulls": torch.cat([*self.nulls, self.u.detach()]).cpu(),
            "best": self.best.cpu(),
            "best_loss": torch.tensor([self.best_loss, float(self.worse)], dtype=torch.float64).nan_to_num(posinf=NONE),
            "x": self.x.detach().cpu(),
            "counts": torch.tensor(self.counts),
        }

    def restore_own(self, state: dict[str, Tensor]) -> None:
        *finished, current = state["nulls"].to(self.u).split(1)
        self.nulls = finished
        self._start(current)
        self.best, self.x = state["best"].to(self.u), state["x"].to(self.trajectory)
        best_loss, worse = state["best_loss"].tolist()
        self.best_loss, self.worse = float("inf") if best_loss == NONE else best_loss, int(worse)
        self.counts = state["counts"].tolist()
