"""SINE (Zhang et al. 2023, arXiv 2212.04489), eq. 1, fine-tuning: argmin_theta E || eps_theta(z_t, t, c) - eps ||^2.

A copy of the model is overfitted to one image and one fixed prompt, either on the whole image or on patches whose
place is given by a position map (patches.py, position_map.py). The caller chooses what is trained, low-rank factors or
all weights; here it is a table of parameters.

Source: main.py, ddpm.py and the configurations of the reference code. For patches it adds a second term that the paper
does not mention, the L1 distance of the denoised estimate, (t / T)^2 * mean | pool(x0_hat) - pool(x0) | with pool an
average to 64 x 64. As x0_hat - x0 = -sigma_t * (eps_theta - eps), it emphasises high noise, where the layout is decided
and where guidance is later applied.

Deviations, each with its reason:
- x0 is the mean of the autoencoder's posterior (what ComfyUI encodes); the reference code samples it in every step;
- patches are prepared in advance, and repeat after as many steps as there are patches;
- one or several images; a mask restricts both terms to the subject; prior preservation (DreamBooth) exists for
  ablation, with weight 0 as in the reference code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Denoiser, Prompt, masked_mean, output_error
from ..fit.fit import Fit, finite_or_raise, in_groups, step_generator

LEARNING_RATE = 1e-4  # for low-rank factors
LEARNING_RATE_FULL = 1e-6  # for all weights (paper)
RECON_WEIGHT = 1.0  # scale_recon_loss of the patch configurations
POOLED = 64  # latent pixels; a training square of 512 pixels is not pooled


@dataclass(frozen=True)
class FineTuneSettings:
    """The settings that determine a run's result, besides model, samples and prompt."""

    learning_rate: float = LEARNING_RATE
    seed: int = 0
    recon_weight: float = RECON_WEIGHT
    prior_weight: float = 0.0


@dataclass(frozen=True)
class Samples:
    """The training data, in the order of the updates.

    x0 [N, C, h, w] in the model's latent space; boxes [N, 4] (y0, x0, y1, x1 in cells) or None; mask [N, 1, h, w] of
    ones and zeros, or None. They repeat after N updates.
    """

    x0: Tensor
    boxes: Tensor | None = None
    mask: Tensor | None = None

    def at(self, step: int, device: torch.device | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x0 [1, C, h, w], box [1, 4] and mask [1, 1, h, w] for an update."""
        i = step % self.x0.shape[0]
        box, mask = (None if part is None else part[i : i + 1].to(device) for part in (self.boxes, self.mask))
        return self.x0[i : i + 1].to(device), box, mask


@dataclass(frozen=True)
class Prior:
    """Images of the subject's class, so that the model does not forget it; prompt and denoiser (masks) are theirs."""

    samples: Samples
    prompt: Callable[[], Prompt]
    denoiser: Denoiser


def recon_term(denoised: Tensor, x0: Tensor, t: Tensor, count: int, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of (t / T)^2 * mean | pool(x0_hat) - pool(x0) |; t [B] of T = count timesteps."""
    difference = (denoised - x0).float()
    size = (min(x0.shape[-2], POOLED), min(x0.shape[-1], POOLED))
    if mask is not None:
        difference, mask = difference * mask, mask.float().expand(x0.shape[0], *mask.shape[1:]).flatten(1, -3)
    difference = difference.flatten(1, -3)  # the only frame of a video model
    if size != tuple(x0.shape[-2:]):
        difference = F.adaptive_avg_pool2d(difference, size)
        mask = None if mask is None else F.adaptive_avg_pool2d(mask, size)
    distance = difference.abs().mean((1, 2, 3))
    if mask is not None:
        distance = distance / mask.mean((1, 2, 3))
    return ((t.to(distance) / count) ** 2 * distance).mean()


class FineTune(Fit):
    prefix = "leaf."

    def __init__(
        self,
        denoiser: Denoiser,
        samples: Samples,
        prompt: Callable[[], Prompt],
        parameters: Mapping[str, nn.Parameter],
        settings: FineTuneSettings,
        prior: Prior | None = None,
        at: Callable[[int, int], None] = lambda _t, _count: None,
    ) -> None:
        """prompt() is called before every prediction, so that a text encoder that trains too is run again; at(t, T)
        too, for weights that depend on the timestep.

        parameters: float32 leaves that the denoiser (and prompt) depend on, keyed by the names used in state().
        """
        self.denoiser, self.samples, self.prompt, self.prior, self.at = denoiser, samples, prompt, prior, at
        self.parameters, self.settings = dict(parameters), settings
        leaves = list(self.parameters.values())
        self.device = leaves[0].device
        self.optimizer = torch.optim.AdamW(in_groups(leaves), lr=settings.learning_rate, foreach=True)
        self.losses: list[float] = []

    def draw(self, samples: Samples, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timestep [1] and noise [1, C, h, w] of the next update."""
        t = torch.randint(self.denoiser.sigmas.shape[0], (1,), generator=generator)
        return t, torch.randn(1, *samples.x0.shape[1:], generator=generator)

    def loss(
        self,
        prompt: Prompt,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        box: Tensor | None = None,
        mask: Tensor | None = None,
        recon_weight: float = 0.0,
        denoiser: Denoiser | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Eq. 1 plus recon_weight times the second term, for one batch; and the denoised estimate."""
        sigma = self.denoiser.sigmas.to(x0)[t.to(x0.device)]
        self.at(int(t.max()), len(self.denoiser.sigmas))
        inputs = {} if prompt.pooled is None else {"pooled": prompt.pooled}
        inputs |= {} if box is None else {"boxes": box}
        error, denoised = output_error(denoiser or self.denoiser, x0, noise.to(x0), sigma, prompt.context, **inputs)
        loss = masked_mean(error.float().square(), mask)
        if recon_weight:
            loss = loss + recon_weight * recon_term(denoised, x0, t, self.denoiser.sigmas.shape[0], mask)
        return loss, denoised

    def update(self) -> Tensor:
        generator = step_generator(self.settings.seed, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        x0, box, mask = self.samples.at(self.step, self.device)
        t, noise = self.draw(self.samples, generator)
        loss, denoised = self.loss(self.prompt(), x0, t, noise, box, mask, self.settings.recon_weight)
        value = finite_or_raise(loss, self.step)
        loss.backward()
        if self.prior is not None and self.settings.prior_weight:
            value += self._prior(self.prior, generator)
        gradients = [leaf.grad for leaf in self.parameters.values() if leaf.grad is not None]
        devices = {gradient.device for gradient in gradients}  # a text encoder may be on another one
        parts = [[gradient for gradient in gradients if gradient.device == device] for device in devices]
        norms = [torch.stack(torch._foreach_norm(part)).sum().cpu() for part in parts]
        finite_or_raise(torch.stack(norms).sum(), self.step, "gradient")
        self.optimizer.step()
        self.losses.append(value)
        return denoised.detach()

    def _prior(self, prior: Prior, generator: torch.Generator) -> float:
        """The prior-preservation term, with its own backward pass so that only one graph is held at a time."""
        x0, box, mask = prior.samples.at(self.step, self.device)
        t, noise = self.draw(prior.samples, generator)
        error = self.loss(prior.prompt(), x0, t, noise, box, mask, denoiser=prior.denoiser)[0]
        loss = self.settings.prior_weight * error
        value = finite_or_raise(loss, self.step, "prior loss")
        loss.backward()
        return value
