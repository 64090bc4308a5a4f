"""The objective of HiPer (Han et al. 2023, arXiv 2303.08767): argmin_h E || eps_theta(z_t, t, [c, h]) - eps ||^2.

The text encoder's output for the source prompt is a sequence of token embeddings (77 x 768 for SD1.x). HiPer freezes
the model and the leading tokens c, and optimises only the last n tokens h, on one image. Any other prompt that ends
with the learned tokens then shows the subject.

Source: the authors' train.py and inference.py. Deviations, each with its reason:
- x0 is the mean of the autoencoder's posterior, as ComfyUI encodes it; the reference code uses one random sample for
  the whole run;
- the noise is drawn in float32, in the reference code in float16; h and Adam are float32 in both;
- a mask restricts the loss to the subject (HiFi Tuner eq. 6); without a mask the loss is that of the reference code;
- several images are allowed, one drawn per update;
- the last state is saved too; the reference code loses it unless it falls on a saving step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, masked_mean, output_error
from ..fit.fit import Fit, finite_or_raise, step_generator
from ..prompt.conditioning import with_tail

TOKENS = 5  # train.py --n_hiper: more tokens capture more identity and leave less room for the edit
LEARNING_RATE = 5e-3  # README and script.sh; the argument's default is 1e-3
STEPS = 1000  # the checkpoint that inference.py uses, of 1500 trained
SAVE_EVERY = 100
SCALE = 0.8  # inference.py multiplies h by it (towards zero, not towards the padding)


@dataclass(frozen=True)
class HiPerSettings:
    """What determines the result of a run, besides the model, the image and the prompt."""

    tokens: int = TOKENS
    learning_rate: float = LEARNING_RATE
    seed: int = 0
    t_low: int = 0
    t_high: int = 999


class HiPer(Fit):
    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        context: Tensor,
        start: Tensor,
        settings: Any,
        mask: Tensor | None = None,
        regularizer: Any = None,
    ) -> None:
        """x0 [B, C, h, w] in the model's latent space; context [1, tokens, d] of the source prompt; start [n, d], the
        initial h; settings: HiPerSettings, or those of Algorithm 1; mask [B or 1, 1, h, w] of ones and zeros;
        regularizer: HiFi Tuner's (hifi_tuner.Regularizer), whose eq. 6 is then minimised.
        """
        self.denoiser, self.x0, self.context, self.mask, self.settings = denoiser, x0, context, mask, settings
        self.regularizer = regularizer
        self.levels, self.losses = denoiser.sigmas, list[float]()
        self.begin(start)

    def begin(self, start: Tensor) -> None:
        """Begin from these tokens, with a new Adam state."""
        self.h = start.detach().to(device=self.x0.device, dtype=torch.float32).clone().requires_grad_(True)
        self.parameters = {"h": self.h}
        self.optimizer = torch.optim.Adam([self.h], lr=self.settings.learning_rate)

    def draw(self) -> tuple[int, Tensor, Tensor]:
        """Image index, timestep [1] and noise [1, C, h, w] for the next update."""
        generator = step_generator(self.settings.seed, self.step)
        index = int(torch.randint(self.x0.shape[0], (1,), generator=generator))
        t = torch.randint(self.settings.t_low, self.settings.t_high + 1, (1,), generator=generator)
        noise = torch.randn(1, *self.x0.shape[1:], generator=generator)
        return index, t, noise

    def loss(self, index: int, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """|| eps_theta - eps ||^2 (a mean) for one draw, plus the regularizer's term; with the denoised estimate."""
        x0 = self.x0[index : index + 1]
        sigma = self.levels[t].to(x0)
        error, denoised = output_error(self.denoiser, x0, noise.to(x0), sigma, with_tail(self.context, self.h))
        mask = None if self.mask is None else self.mask[index % self.mask.shape[0]][None]
        loss = masked_mean(error.float().square(), mask)
        return loss if self.regularizer is None else loss + self.regularizer.term(self.h), denoised

    def update(self) -> Tensor:
        loss, denoised = self.loss(*self.draw())
        value = finite_or_raise(loss, self.step)
        self.descend(loss, self.h)
        self.losses.append(value)
        if self.regularizer is not None:
            self.regularizer.pull(self.h, self.settings.learning_rate)
        return denoised.detach()
