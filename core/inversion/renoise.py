"""ReNoise inversion (Garibi et al. 2024, arXiv 2403.14602), Algorithm 1, as SISO uses it for few-step models.

The steps of a few-step model are so large that inverting with the prediction at the cleaner level is inaccurate. So
each step is inverted several times, each time with the prediction for the latest estimate, and the last predictions are
averaged. Two corrections keep the noise usable:

- the predictions are regularized to look like noise: in each patch with the distribution of a prediction for truly
  noised latents (KL), and without correlation between neighbours;
- for ancestral samplers, which add noise in each step, the added noise is corrected so that the step returns to the
  known latent.

In ComfyUI's coordinates, x = x0 + sigma n, an ancestral step from sigma to sigma_next < sigma is

    x_next = x + (sigma_down - sigma) eps + sigma_up n,   sigma_up^2 = sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2

with sigma_down^2 = sigma_next^2 - sigma_up^2 (Karras et al. 2022, arXiv 2206.00364).

Source: the authors' code as SISO's script calls it, with its settings. Its inversion step writes sigma_down as
sigma_next^2 / sigma, which is the same number as the sampler's. Deviations, each with its reason:
- predictions after the last averaged one are omitted, because the reference code does not use them;
- the noise levels may be any that a sampler accepts, and the last is 0 also for DDIM, where the reference code ends at
  sigma(0);
- the noises have the latent's own size; in the reference code they always have the size for 512 px.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Denoiser, predicted_noise, relabelled

KL_WEIGHT, CORRELATION_WEIGHT = 0.065, 20.0
OUTER_STEPS, ROLLS = 4, 5
KL_CLIP = 100.0
PATCH, SMALLEST = 4, 8
CORRECTION_STEPS, CORRECTION_LENGTH = 10, 1.8
ITERATIONS, AVERAGED = 9, 2
LOW_ITERATIONS, LOW_TIMESTEP = 5, 250  # LOW_ITERATIONS for steps from a timestep below LOW_TIMESTEP
SEED = 7865


def ancestral_sigmas(sigma: Tensor, following: Tensor, ancestral: bool = True) -> tuple[Tensor, Tensor]:
    """sigma_down and sigma_up of a step between two levels, following < sigma: following and 0 without noise."""
    if not ancestral:
        return following, torch.zeros_like(following)
    up = (following**2 * (sigma**2 - following**2).abs() / sigma**2).sqrt()
    return following**2 / sigma, up


def ancestral_step(x: Tensor, eps: Tensor, noise: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    down, up = ancestral_sigmas(sigma, following)
    return x + (down - sigma) * eps + up * noise


def inverse_ancestral_step(
    x: Tensor, eps: Tensor, noise: Tensor, sigma: Tensor, following: Tensor, ancestral: bool = True
) -> Tensor:
    """The latent before an ancestral step, or one without noise, that led to x."""
    down, up = ancestral_sigmas(sigma, following, ancestral)
    return x - (down - sigma) * eps - up * noise


def patch_kl(eps: Tensor, like: Tensor) -> Tensor:
    """The KL loss between the 4 x 4 patches of eps [1, C, h, w] and those of `like`, from their means and variances,
    summed over channels and patches."""
    patches0, patches1 = (F.unfold(each.transpose(0, 1), PATCH, stride=PATCH) for each in (eps, like))
    mean0, var0 = patches0.mean(1), patches0.var(1) + 0.0
    mean1, var1 = patches1.mean(1), patches1.var(1) + 0.0
    tiny = 1e-6
    ratio = ((var1 + tiny) / (var0 + tiny)).log()
    return (ratio + (var0 + (mean0 - mean1) ** 2) / (var1 + tiny) - 1).abs().sum()


def autocorrelation(eps: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Squared correlations of eps [1, C, h, w] with itself, shifted along both axes, at full size and at repeated
    halvings down to 8. Shifts are drawn from the generator; without one they are 1."""
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


def regularize(
    eps: Tensor,
    like: Tensor,
    generator: torch.Generator,
    kl_weight: float = KL_WEIGHT,
    correlation_weight: float = CORRELATION_WEIGHT,
) -> Tensor:
    """Regularize a prediction to look like noise; `like` is a prediction for truly noised latents. A latent's frame
    axis, of one frame, counts as channels.
    """
    shape = eps.shape
    with torch.inference_mode(False), torch.enable_grad():  # predictions have no gradient; the losses need one
        eps, like = (each.detach().flatten(1, -3).clone() for each in (eps, like))
        for _ in range(OUTER_STEPS):
            if kl_weight:
                leaf = eps.requires_grad_(True)
                (gradient,) = torch.autograd.grad(patch_kl(leaf, like), leaf)
                eps = eps.detach() - kl_weight * gradient.clamp(-KL_CLIP, KL_CLIP)
            for _ in range(ROLLS if correlation_weight else 0):
                leaf = eps.requires_grad_(True)
                (gradient,) = torch.autograd.grad(autocorrelation(leaf, generator), leaf)
                eps = eps.detach() - correlation_weight * gradient / ROLLS
    return eps.detach().view(shape)


def corrected_noise(
    noise: Tensor, x: Tensor, eps: Tensor, expected: Tensor, sigma: Tensor, following: Tensor
) -> Tensor:
    """The noise to add in the step from x so that it leads close to the expected latent; it changes by at most 18 in
    norm.

    A step to level 0 adds no noise, and the noise is returned unchanged.
    """
    down, up = ancestral_sigmas(sigma, following)
    if not float(up):
        return noise
    required = (expected - x - (down - sigma) * eps) / up
    for _ in range(CORRECTION_STEPS):
        difference = noise - required
        noise = noise - CORRECTION_LENGTH * difference / difference.norm()
    return noise


@dataclass(frozen=True)
class ReNoiseSettings:
    """ancestral: for samplers that add noise in each step, as for SDXL-turbo; otherwise the steps are DDIM's, as for
    SD-turbo, with correlation_weight 0. averaged: how many of the last predictions of a step are averaged."""

    ancestral: bool = True
    iterations: int = ITERATIONS
    averaged: int = AVERAGED
    kl_weight: float = KL_WEIGHT
    correlation_weight: float = CORRELATION_WEIGHT
    seed: int = SEED


@dataclass(frozen=True)
class Replay:
    """What is needed to sample an inverted image again: sigmas [T + 1], and the noise to add in each step as noises
    [T, C, h, w], or [0, C, h, w] for none."""

    sigmas: Tensor
    noises: Tensor

    def step(self, x: Tensor, eps: Tensor, step: int) -> Tensor:
        """The latent after a step from x, with eps predicted for x."""
        sigma, following = self.sigmas[step : step + 2].to(x)
        if len(self.noises):
            return ancestral_step(x, eps, self.noises[step : step + 1].to(x), sigma, following)
        return x + (following - sigma) * eps


def renoise(
    denoiser: Denoiser,
    x0: Tensor,
    context: Tensor,
    sigmas: Tensor,
    settings: ReNoiseSettings,
    on_step: Callable[[Tensor], None] = lambda _x: None,
) -> tuple[Tensor, Replay]:
    """The latent [1, C, h, w] from which sampling `sigmas` returns to x0, and the Replay to sample it with.

    sigmas [T + 1] descending; the last is 0. context [1, tokens, width] of the prompt that describes x0; no guidance.
    on_step(latent) is called after each step, and may raise to stop.
    """
    generator, weights = torch.Generator().manual_seed(settings.seed), (settings.kl_weight, settings.correlation_weight)
    sigmas = sigmas.to(x0)
    noises = [torch.randn(x0.shape, generator=generator).to(x0) for _ in sigmas[:-1]]
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    low = denoiser.sigmas[min(LOW_TIMESTEP, len(denoiser.sigmas) - 1)].to(x0)
    x = x0
    for step in range(len(sigmas) - 2, -1, -1):
        sigma, following = sigmas[step], sigmas[step + 1]
        like = predicted_noise(denoiser, denoiser.noised(x0, noise, sigma.view(1)), sigma, context)
        # At low levels there are fewer iterations and all predictions are averaged, as in the reference code.
        count = min(LOW_ITERATIONS, settings.iterations) if sigma < low else settings.iterations + 1
        first = 0 if sigma < low else max(count - settings.averaged, 0)
        how = {"noise": noises[step], "sigma": sigma, "following": following, "ancestral": settings.ancestral}
        invert_step = functools.partial(inverse_ancestral_step, x, **how)
        predictions, guess = [], x if settings.ancestral else relabelled(denoiser.noised, x, following, sigma)
        for index in range(count):
            eps = predicted_noise(denoiser, guess, sigma, context)
            if index >= first:
                predictions.append(eps)
                eps = regularize(eps, like, generator, *weights)
            guess = invert_step(eps)
        guess = invert_step(regularize(torch.stack(predictions).mean(0), like, generator, *weights))
        if settings.ancestral:
            eps = predicted_noise(denoiser, guess, sigma, context)
            noises[step] = corrected_noise(noises[step], guess, eps, x, sigma, following)
        x = guess
        on_step(x)
    return x, Replay(sigmas, torch.cat(noises)[: None if settings.ancestral else 0])
