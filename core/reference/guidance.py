"""HiFi Tuner (Wang et al. 2023, arXiv 2312.00079), Algorithm 2: sampling that takes the details from a reference.

x*_T .. x*_0 is the trajectory of a reference image, inverted without guidance; M is the subject's mask in it. From t_s
to t_e a second empty prompt phi_h is optimised at each step, with J updates of

    phi_h <- phi_h - eta grad || x*_(t-1)[M] - F(x_t, [c, c_s^t], phi_h)[M] ||^2

so that the guided step F meets the trajectory inside the mask. The step uses phi_h inside the mask and phi elsewhere.
At t_s the latent inside the mask is replaced by the trajectory's. The guided step is affine in the unconditional
prediction, so it equals a step guided against eps(phi_h) in M and eps(phi) outside: two masked negatives in any
sampler.

There is no public code. The paper leaves open, and we choose:
- the loss is a mean over the masked elements, of latents of variance 1 as in null_text.py;
- phi_h is carried from step to step, as written; Adam's moments are reset in each step, as in null-text optimisation;
- guidance weight 7.5.
The paper's t counts 50 steps down from the noisiest, t = 50: t_s = 40 and t_e = 10 are the steps 10 to 40 of 0 to 49.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser, masked_mean, predicted_noise, variance
from ..fit.fit import Fit, finite_or_raise, random_numbers, rollback_on_interrupt

CFG = 7.5
INNER_STEPS = 10  # J
LEARNING_RATE = 1e-2  # eta
START_PERCENT, END_PERCENT = 0.21, 0.82  # of the sampling: timesteps 789 to 180, t_s = 40 to t_e = 10 of 50


@dataclass(frozen=True)
class ReferenceSettings:
    """The settings that determine the result, besides trajectory, mask, noise and prompts."""

    cfg: float = CFG
    inner_steps: int = INNER_STEPS
    learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Reference:
    """The reference of a sampling: trajectory [T + 1, 1, C, h, w] and sigmas [T + 1] as invert() returns them, mask
    [1, 1, h, w] of ones and zeros, window: the steps from t_s to t_e, excluding the first step of the sampling.
    """

    trajectory: Tensor
    sigmas: Tensor
    mask: Tensor
    window: range


class ReferenceGuide(Fit):
    """The whole sampling, with the optimisation in its window: J updates per step there.

    With J = 0 there are no updates: advance() samples.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        start: Tensor,
        reference: Reference,
        contexts: Sequence[Tensor],
        null: Tensor,
        settings: ReferenceSettings,
        unguided: Denoiser | None = None,
    ) -> None:
        """start [1, C, h, w]: the noise as a sampler has it. contexts: the prompt's tokens [1, n, d] at each of T
        steps. null [1, n, d]: tokens of the empty prompt. unguided: as in NullText.
        """
        self.denoiser, self.unguided = denoiser, unguided or denoiser
        self.trajectory, self.sigmas = reference.trajectory, reference.sigmas.to(reference.trajectory)
        self.mask, self.window = reference.mask, reference.window
        self.contexts, self.null, self.settings = contexts, null, settings
        self.x, self.index = start, 0  # the latent before step `index`
        self.nulls: list[Tensor] = []  # phi_h of the finished steps in the window, [1, n, d] each
        self.losses: list[float] = []
        self._predictions: tuple[Tensor, Tensor] | None = None
        self._start(null)

    @property
    def done(self) -> bool:
        return self.index == len(self.sigmas) - 1

    def _start(self, phi_h: Tensor) -> None:
        self.phi_h = phi_h.detach().float().clone().requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.phi_h], lr=self.settings.learning_rate)

    def _predict(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """eps for the prompt and for the empty prompt, before a step."""
        with torch.no_grad(), random_numbers(index):  # in whichever update they are needed first
            sigma = self.sigmas[index]
            eps_c = predicted_noise(self.denoiser, x, sigma, self.contexts[index])
            return eps_c, predicted_noise(self.unguided, x, sigma, self.null)

    def _guided_step(self, x: Tensor, index: int, eps_c: Tensor, eps_u: Tensor) -> Tensor:
        """F: the latent after a step guided against eps_u."""
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * (eps_u + self.settings.cfg * (eps_c - eps_u))

    def _plain_steps(self, x: Tensor, index: int) -> tuple[Tensor, int]:
        """Steps without optimisation, up to the next optimised one or the end: the latent there, and its index."""
        while index < len(self.sigmas) - 1:
            if index == self.window[0]:
                x = torch.where(self.mask > 0.5, self.trajectory[index], x)
            if index in self.window and self.settings.inner_steps:
                break
            x = self._guided_step(x, index, *self._predict(x, index))
            index += 1
        return x, index

    def advance(self) -> None:
        """Take the steps before the next one to be optimised, if there are any."""
        self.x, self.index = self._plain_steps(self.x, self.index)

    def update(self) -> Tensor:
        self.advance()
        i, x = self.index, self.x
        self._predictions = self._predictions or self._predict(x, i)  # the same for all updates of a step
        eps_c, eps_0 = self._predictions
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        eps = predicted_noise(self.unguided, x, sigma, self.phi_h)
        x_next = self._guided_step(x, i, eps_c, eps)
        scale = variance(self.denoiser.noised, following)
        loss = masked_mean((x_next - self.trajectory[i + 1]).float().square() / scale, self.mask)
        value = finite_or_raise(loss, self.step)
        denoised = (x - sigma * (eps + self.settings.cfg * (eps_c - eps))).detach()
        last = (self.step + 1) % self.settings.inner_steps == 0
        with rollback_on_interrupt(self, last):
            self.descend(loss, self.phi_h)
            if last:
                with torch.no_grad():
                    eps_h = predicted_noise(self.unguided, x, sigma, self.phi_h)
                eps_u = torch.where(self.mask > 0.5, eps_h, eps_0)
                x, i = self._plain_steps(self._guided_step(x, i, eps_c, eps_u), i + 1)
        self.losses.append(value)
        if last:
            self.nulls.append(self.phi_h.detach().clone())
            self.x, self.index, self._predictions = x, i, None
            self._start(self.phi_h)
        return denoised

    def own_state(self) -> dict[str, Tensor]:
        return {
            "nulls": torch.cat([*self.nulls, self.phi_h.detach()]).cpu(),
            "x": self.x.detach().cpu(),
            "index": torch.tensor(self.index),
        }

    def restore_own(self, state: dict[str, Tensor]) -> None:
        *self.nulls, current = state["nulls"].to(self.phi_h).split(1)
        self._start(current)
        self._predictions = None
        self.x, self.index = state["x"].to(self.trajectory), int(state["index"])
