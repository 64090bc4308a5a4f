"""ReNoise inversion (Garibi et al. 2024, arXiv 2403.14602), Algorithm 1, as SISO uses it for few-step models.

A model of a few steps predicts so much in each that inverting with the prediction at the cleaner level goes astray. So
each level is tried several times: from the latent found last, predict again, invert again, and average the last
predictions. Two corrections keep the noise usable:

- the predictions are made to look like noise: patch by patch of the distribution of a prediction for really noised
  latents (KL), and without correlation between neighbours;
- for samplers that add noise in each step (ancestral ones) the added noise itself is changed, so that the step comes
  back.

In ComfyUI's coordinates, x = x0 + sigma n, an ancestral step from sigma to sigma_next < sigma is

    x_next = x + (sigma_down - sigma) eps + sigma_up n,   sigma_up^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2

with sigma_down^2 = sigma_next^2 - sigma_up^2 (Karras et al. 2022, arXiv 2206.00364).

Source: the authors' code as SISO's script calls it, with its settings. Its inversion step differs from the sampler's,
sigma_down there being sigma_next^2 / sigma, which is the same number. Deviations, each with its reason:
- predictions that their loop makes after the last averaged one are left out: they are not used;
- the levels may be any that a sampler takes, and the last one is 0 also for DDIM, where their code ends at sigma(0);
- the noises are drawn with the latent's own size: theirs is 512 px always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser, predicted_noise, rescaled

KL_WEIGHT, CORRELATION_WEIGHT = 0.065, 20.0
OUTER_STEPS, ROLLS = 4, 5
KL_CLIP = 100.0
PATCH, SMALLEST = 4, 8
CORRECTION_STEPS, CORRECTION_LENGTH = 10, 1.8
ITERATIONS, AVERAGED = 9, 2
LOW_ITERATIONS, LOW_TIMESTEP = 5, 250  # in steps that come from a timestep below
SEED = 7865


def ancestral(sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """sigma_down and sigma_up of a step between two levels, following < sigma."""
    up = (following**2 * (sigma**2 - following**2).abs() / sigma**2).sqrt()
    return following**2 / sigma, up


def stepped(x: Tensor, eps: Tensor, noise: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """The ancestral step from sigma to following."""
    down, up = ancestral(sigma, following)
    return x + (down - sigma) * eps + up * noise


def unstepped(x: Tensor, eps: Tensor, noise: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """The x before a step that led to x."""
    down, up = ancestral(sigma, following)
    return x - (down - sigma) * eps - up * noise


def patch_kl(eps: Tensor, like: Tensor) -> Tensor:
    """How much the patches of eps [1, C, h, w] differ in mean and variance from those of `like`: a sum over channels
    and patches of 4 x 4."""
    one, other = (F.unfold(each.transpose(0, 1), PATCH, stride=PATCH) for each in (eps, like))
    mean0, var0 = one.mean(1), one.var(1) + 0.0
    mean1, var1 = other.mean(1), other.var(1) + 0.0
    tiny = 1e-6
    ratio = ((var1 + tiny) / (var0 + tiny)).log()
    return (ratio + (var0 + (mean0 - mean1) ** 2) / (var1 + tiny) - 1).abs().sum()


def autocorrelation(eps: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Squared correlations of eps [1, C, h, w] with itself, shifted in both directions, at this size and at halves of
    it down to 8. Shifts are drawn from the generator; without one they are 1."""
    total = eps.new_zeros(())
    for channel in eps[0]:
        noise = channel[None, None]
        while True:
            height = noise.shape[2]
            shift = 1 if generator is None else int(torch.randint(0, height // 2, (1,), generator=generator))
            for axis in (2, 3):
                total = total + (noise * noise.roll(shift, axis)).mean() ** 2
            if height <= SMALLEST:
                break
            noise = F.avg_pool2d(noise, 2)
    return total


def regularised(
    eps: Tensor,
    like: Tensor,
    generator: torch.Generator,
    kl_weight: float = KL_WEIGHT,
    correlation_weight: float = CORRELATION_WEIGHT,
) -> Tensor:
    """A prediction made to look like noise; `like` is one for really noised latents."""
    with torch.inference_mode(False), torch.enable_grad():  # predictions come without a gradient; the losses have one
        eps, like = eps.detach().clone(), like.detach().clone()
        for _ in range(OUTER_STEPS):
            if kl_weight:
                leaf = eps.requires_grad_(True)
                (gradient,) = torch.autograd.grad(patch_kl(leaf, like), leaf)
                eps = eps.detach() - kl_weight * gradient.clamp(-KL_CLIP, KL_CLIP)
            for _ in range(ROLLS if correlation_weight else 0):
                leaf = eps.requires_grad_(True)
                (gradient,) = torch.autograd.grad(autocorrelation(leaf, generator), leaf)
                eps = eps.detach() - correlation_weight * gradient / ROLLS
    return eps.detach()


def corrected_noise(
    noise: Tensor, x: Tensor, eps: Tensor, expected: Tensor, sigma: Tensor, following: Tensor
) -> Tensor:
    """The noise to add in the step from x, so that it leads near the expected latent: it moves by at most 18.

    A step to level 0 adds none, and leaves it as it is.
    """
    down, up = ancestral(sigma, following)
    if not float(up):
        return noise
    required = (expected - x - (down - sigma) * eps) / up
    for _ in range(CORRECTION_STEPS):
        away = noise - required
        noise = noise - CORRECTION_LENGTH * away / away.norm()
    return noise


@dataclass(frozen=True)
class ReNoiseSettings:
    """ancestral: for samplers that add noise in each step, as SDXL-turbo's; else the steps are DDIM's, which for
    SD-turbo go without correlation_weight. averaged: how many of the last predictions of a step are."""

    ancestral: bool = True
    iterations: int = ITERATIONS
    averaged: int = AVERAGED
    kl_weight: float = KL_WEIGHT
    correlation_weight: float = CORRELATION_WEIGHT
    seed: int = SEED


@dataclass(frozen=True)
class Replay:
    """How an inverted image is sampled again: along sigmas [T + 1], adding noises [T, C, h, w] step by step, or none
    [0, C, h, w]."""

    sigmas: Tensor
    noises: Tensor

    def stepped(self, x: Tensor, eps: Tensor, step: int) -> Tensor:
        """The latent after a step; eps was predicted for x."""
        sigma, following = self.sigmas[step : step + 2].to(x)
        if len(self.noises):
            return stepped(x, eps, self.noises[step : step + 1].to(x), sigma, following)
        return x + (following - sigma) * eps


def renoise(
    denoiser: Denoiser,
    x0: Tensor,
    context: Tensor,
    sigmas: Tensor,
    settings: ReNoiseSettings,
    on_step: Callable[[int, Tensor], None] = lambda _step, _x: None,
) -> tuple[Tensor, Replay]:
    """The latent [1, C, h, w] from which sampling `sigmas` comes back to x0, and how.

    sigmas [T + 1] descending, the last is 0. context [1, rows, width] of the prompt that describes x0; no guidance.
    on_step(number of steps done, latent) may raise to stop.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    sigmas = sigmas.to(x0)
    noises = [torch.randn(x0.shape, generator=generator).to(x0) for _ in sigmas[:-1]]
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    low = denoiser.sigmas[min(LOW_TIMESTEP, len(denoiser.sigmas) - 1)].to(x0)
    if not settings.ancestral:
        noises = [torch.zeros_like(x0) for _ in noises]
    x = x0
    for step in range(len(sigmas) - 2, -1, -1):
        sigma, following = sigmas[step], sigmas[step + 1]
        like = predicted_noise(denoiser, denoiser.noised(x0, noise, sigma.view(1)), sigma, context)
        # Below, as published, few latents are tried and all predictions are averaged.
        count = min(LOW_ITERATIONS, settings.iterations) if sigma < low else settings.iterations + 1
        first = 0 if sigma < low else max(count - settings.averaged, 0)
        before = _before(x, sigma, following, noises[step], settings.ancestral)
        found, guess = [], x if settings.ancestral else rescaled(x, following, sigma)
        for index in range(count):
            eps = predicted_noise(denoiser, guess, sigma, context)
            if index >= first:
                found.append(eps)
                eps = _as_noise(eps, like, generator, settings)
            guess = before(eps)
        guess = before(_as_noise(torch.stack(found).mean(0), like, generator, settings))
        if settings.ancestral:
            eps = predicted_noise(denoiser, guess, sigma, context)
            noises[step] = corrected_noise(noises[step], guess, eps, x, sigma, following)
        x = guess
        on_step(len(sigmas) - 1 - step, x)
    return x, Replay(sigmas, torch.cat(noises)[: None if settings.ancestral else 0])


def _as_noise(eps: Tensor, like: Tensor, generator: torch.Generator, settings: ReNoiseSettings) -> Tensor:
    return regularised(eps, like, generator, settings.kl_weight, settings.correlation_weight)


def _before(x: Tensor, sigma: Tensor, following: Tensor, noise: Tensor, ancestral: bool) -> Callable[[Tensor], Tensor]:
    """eps -> the latent before the step that led to x."""
    if ancestral:
        return lambda eps: unstepped(x, eps, noise, sigma, following)
    return lambda eps: x + (sigma - following) * eps
