"""ReNoise on a denoiser that is known exactly."""

from __future__ import annotations

import pytest
import torch

from likeness.core.inversion.renoise import (
    ReNoiseSettings,
    Replay,
    ancestral_sigmas,
    corrected_noise,
    regularize,
    renoise,
)

from ..toy import GaussianDenoiser

SIGMAS = torch.tensor([4.0817, 1.6129, 0.6932, 0.0])
PLAIN = {"kl_weight": 0.0, "correlation_weight": 0.0, "seed": 1}


CONTEXT = torch.zeros(1, 1, 4)


class Gaussian(GaussianDenoiser):
    """A Denoiser that remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__(4, (4, 12, 12))
        self.asked: list[float] = []

    def denoised(self, x, sigma, context):
        self.asked.append(float(sigma))
        return super().denoised(x, sigma, context)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))


def sampled(x: torch.Tensor, replay: Replay) -> torch.Tensor:
    denoiser = Gaussian()
    for step, sigma in enumerate(replay.sigmas[:-1]):
        eps = (x - denoiser.denoised(x, sigma.view(1), CONTEXT)) / sigma
        x = replay.step(x, eps, step)
    return x


@pytest.mark.parametrize("kind", [True, False])
def test_sampling_comes_back(kind):
    x0 = picture()
    start, replay = renoise(Gaussian(), x0, CONTEXT, SIGMAS, ReNoiseSettings(kind, iterations=60, **PLAIN))
    assert replay.noises.shape == (3 if kind else 0, 4, 12, 12)
    error = float((sampled(start, replay) - x0).abs().max())
    assert error < (0.3 if kind else 0.1)
    once, again = renoise(Gaussian(), x0, CONTEXT, SIGMAS, ReNoiseSettings(kind, iterations=1, **PLAIN))
    assert float((sampled(once, again) - x0).abs().max()) > error


def test_with_the_published_settings_the_noise_stays_noise():
    """Of unit variance, and without correlation between neighbours, next to an inversion that is not corrected."""
    smooth = torch.nn.functional.interpolate(picture()[..., :3, :3], (12, 12), mode="bicubic")
    found = {}
    for name, settings in {"plain": ReNoiseSettings(True, **PLAIN), "published": ReNoiseSettings()}.items():
        start, _ = renoise(Gaussian(), smooth, CONTEXT, SIGMAS, settings)
        noise = start / float(1 + SIGMAS[0] ** 2) ** 0.5
        found[name] = float((noise * noise.roll(1, -1)).mean().abs() / noise.square().mean())
    assert found["published"] < found["plain"]


@pytest.mark.parametrize("kind", [True, False])
def test_as_many_predictions_as_published(kind):
    """One for really noised latents, nine tries and the first, and one for the correction; below timestep 250 five."""
    denoiser = Gaussian()
    settings = ReNoiseSettings(kind, **PLAIN)
    renoise(denoiser, picture(), CONTEXT, SIGMAS, settings)
    counts = [denoiser.asked.count(float(sigma)) for sigma in SIGMAS[:-1]]
    assert counts == [11 + kind, 11 + kind, 6 + kind]
    assert denoiser.asked == sorted(denoiser.asked)


def test_a_seed_decides_it_and_steps_are_told():
    def run(seed: int, on_step=lambda _x: None):
        settings = ReNoiseSettings(**{**PLAIN, "seed": seed})
        return renoise(Gaussian(), picture(), CONTEXT, SIGMAS, settings, on_step)

    told: list[torch.Tensor] = []
    first, again = run(1, told.append), run(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].noises, again[1].noises)
    assert not torch.equal(first[0], run(2)[0]) and len(told) == 3 and torch.equal(told[-1], first[0])


def test_a_noise_moves_by_at_most_18():
    sigma, following = SIGMAS[:2]
    noise, x, eps = (picture(seed) for seed in (1, 2, 3))
    fixed = corrected_noise(noise, x, eps, 1000 * picture(4), sigma, following)
    assert float((fixed - noise).norm()) == pytest.approx(18.0, rel=1e-4)
    unmoved = corrected_noise(noise, x, eps, picture(4), sigma, torch.tensor(0.0))
    assert torch.equal(unmoved, noise), "a step to 0 adds none"


def test_levels_of_an_ancestral_step_are_those_of_the_sampler():
    sigma, following = SIGMAS[:2]
    down, up = ancestral_sigmas(sigma, following)
    assert float(down**2 + up**2) == pytest.approx(float(following**2), rel=1e-5)


def test_predictions_without_a_gradient_are_corrected_too():
    """Nodes run in inference mode."""
    plain = regularize(picture(1), picture(2), torch.Generator().manual_seed(0), 0.01)
    with torch.inference_mode():
        inferred = regularize(picture(1), picture(2), torch.Generator().manual_seed(0), 0.01)
    assert torch.equal(plain, inferred) and not torch.equal(plain, picture(1))


def test_an_image_that_is_a_video_of_one_frame_is_corrected_as_an_image():
    eps, like = picture(1), picture(2)
    flat, framed = (
        regularize(*pair, torch.Generator().manual_seed(1), 0.01, 1.0)
        for pair in ((eps, like), (eps[:, :, None], like[:, :, None]))
    )
    assert torch.equal(framed, flat[:, :, None]) and not torch.equal(flat, eps)
