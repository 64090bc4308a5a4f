"""Algorithm 2 of HiFi Tuner, null-text optimisation that is cut short, and landings, on a denoiser in closed form."""

from __future__ import annotations

import pytest
import torch

from likeness.core.fit.fit import start_random_numbers
from likeness.core.inversion.ddim import invert
from likeness.core.inversion.null_text import NullText, NullTextSettings
from likeness.core.inversion.rectify import landing_prediction, step_at
from likeness.core.reference.guidance import Reference, ReferenceGuide, ReferenceSettings

from ..toy import GaussianDenoiser

WIDTH, STEPS = 16, 8
WINDOW = range(2, 6)


class Cut(BaseException):
    """Stands for ComfyUI's interrupt."""


class Drawing(GaussianDenoiser):
    """A denoiser that draws from torch's own random numbers in each call, as with ToMe on the model."""

    def denoised(self, x, sigma, context):
        return super().denoised(x, sigma, context) + 0.01 * torch.rand(x.shape)


class World:
    """A denoiser, prompts for every step, a reference's trajectory, a mask and a start."""

    def __init__(self, kind: type[GaussianDenoiser] = GaussianDenoiser) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(4)
        self.denoiser = kind(WIDTH)
        self.contexts = list(torch.randn(STEPS, 1, 7, WIDTH, generator=generator))
        self.null, caption = torch.randn(2, 1, 7, WIDTH, generator=generator)
        self.sigmas = torch.cat([torch.logspace(1, -1, STEPS), torch.zeros(1)])
        picture = self.denoiser.mean(torch.randn(1, 7, WIDTH, generator=generator))
        self.trajectory = invert(self.denoiser, picture, caption, self.sigmas)
        self.mask = torch.zeros(1, 1, *picture.shape[-2:])
        self.mask[..., 1:4, 2:4] = 1
        self.start = 10 * torch.randn(picture.shape, generator=generator)

    def guide(self, inner: int = 5, learning_rate: float = 0.05, **changes) -> ReferenceGuide:
        settings = ReferenceSettings(3.0, inner, learning_rate)
        given = {"start": self.start, "trajectory": self.trajectory, "mask": self.mask, "window": WINDOW, **changes}
        reference = Reference(given["trajectory"], self.sigmas, given["mask"], given["window"])
        return ReferenceGuide(self.denoiser, given["start"], reference, self.contexts, self.null, settings)

    def eps(self, x, sigma, context):
        return (x - self.denoiser.denoised(x, sigma.view(1), context)) / sigma

    def step(self, x, i, eps_u):
        """F of the paper, as DDIM with latents of variance 1."""
        here, there = self.sigmas[i], self.sigmas[i + 1]
        alpha, following = 1 / (1 + here**2), 1 / (1 + there**2)
        eps = eps_u + 3.0 * (self.eps(x, here, self.contexts[i]) - eps_u)
        z = x * alpha.sqrt()
        z0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        return (following.sqrt() * z0 + (1 - following).sqrt() * eps) / following.sqrt()

    def plain(self) -> torch.Tensor:
        x = [self.start]
        for i in range(STEPS):
            x.append(self.step(x[-1], i, self.eps(x[-1], self.sigmas[i], self.null)))
        return torch.stack(x)


def finished(fit):
    """A fit, updated to its end."""
    while not fit.done:
        start_random_numbers(fit.step)  # as train() does
        fit.update()
    return fit


def test_it_is_the_algorithm_as_it_is_written():
    world = World()
    phi_h, x, inside = world.null.clone(), world.start, world.mask > 0.5
    for i in range(STEPS):
        if i == WINDOW[0]:
            x = torch.where(inside, world.trajectory[i], x)
        following = world.step(x, i, world.eps(x, world.sigmas[i], world.null))
        if i in WINDOW:
            phi_h = phi_h.detach().requires_grad_(True)
            adam = torch.optim.Adam([phi_h], lr=0.05)
            for _ in range(5):
                missed = world.step(x, i, world.eps(x, world.sigmas[i], phi_h)) - world.trajectory[i + 1]
                loss = missed[inside.expand_as(missed)].square().mean() / (1 + world.sigmas[i + 1] ** 2)
                adam.zero_grad()
                loss.backward()
                adam.step()
            guided = world.step(x, i, world.eps(x, world.sigmas[i], phi_h)).detach()
            following = torch.where(inside, guided, following)
        x = following
    fit = finished(world.guide())
    torch.testing.assert_close(fit.x, x, atol=1e-4, rtol=1e-4)
    assert len(fit.nulls) == len(WINDOW) and fit.step == 5 * len(WINDOW)
    torch.testing.assert_close(fit.nulls[-1], phi_h.detach(), atol=1e-3, rtol=0)


def test_the_subject_comes_nearer_to_the_reference_the_longer_it_is_optimised():
    world = World()

    def apart(inner: int, learning_rate: float = 0.05) -> float:
        fit = world.guide(inner, learning_rate)
        fit.advance()
        missed = finished(fit).x - world.trajectory[-1]
        return float((missed * world.mask).square().sum())

    plain = float(((world.plain()[-1] - world.trajectory[-1]) * world.mask).square().sum())
    assert apart(20) < 0.8 * apart(2) < apart(0) and apart(20) < 0.5 * plain


def test_without_updates_and_with_nothing_to_change_it_is_plain_sampling():
    world = World()
    nowhere = world.guide(0, mask=torch.zeros_like(world.mask))
    nowhere.advance()
    own = world.plain()
    torch.testing.assert_close(nowhere.x, own[-1], atol=1e-4, rtol=1e-4)
    elsewhere = world.guide(0, window=range(STEPS - 1, STEPS), mask=torch.zeros_like(world.mask))
    elsewhere.advance()
    assert torch.equal(elsewhere.x, nowhere.x) and not elsewhere.losses
    same = world.guide(0, trajectory=own)
    same.advance()
    torch.testing.assert_close(same.x, nowhere.x, atol=1e-4, rtol=1e-4)
    assert same.done and nowhere.done


def test_a_resumed_run_is_the_same_bit_for_bit():
    world = World()
    whole = finished(world.guide())
    for stop in (1, 4, 5, 7, 19):
        first = world.guide()
        for _ in range(stop):
            first.update()
        second = world.guide()
        second.restore({name: value.clone() for name, value in first.state().items()})
        assert torch.equal(finished(second).x, whole.x) and second.losses == whole.losses
        assert all(torch.equal(a, b) for a, b in zip(second.nulls, whole.nulls, strict=True))


def cut_at(denoiser: GaussianDenoiser, call: int):
    """The denoiser interrupted at this call, once."""
    whole, calls = denoiser.denoised, []

    def denoised(*args):
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return whole(*args)

    denoiser.denoised = denoised


def walked_after_cut(fit, call: int):
    cut_at(fit.denoiser, call)
    with pytest.raises(Cut):
        finished(fit)
    return finished(fit)


KINDS = pytest.mark.parametrize("kind", [GaussianDenoiser, Drawing])


@KINDS
def test_an_interrupt_at_any_call_of_the_model_leaves_no_trace(kind):
    whole = finished(World(kind).guide(2))
    for call in range(1, 29):
        fit = walked_after_cut(World(kind).guide(2), call)
        assert fit.losses == whole.losses and torch.equal(fit.x, whole.x)


OTHERS = [
    pytest.param(patience, kind, marks=pytest.mark.slow) for patience, kind in ((1, GaussianDenoiser), (0, Drawing))
]


@pytest.mark.parametrize(("patience", "kind"), [(0, GaussianDenoiser), (1, Drawing), *OTHERS])
def test_null_text_too(patience, kind):
    def fit() -> NullText:
        world = World(kind)
        settings = NullTextSettings(3.0, 3, 0.05, 1e-3, patience)
        return NullText(world.denoiser, world.trajectory, world.sigmas, world.contexts[0], world.null, settings)

    whole = finished(fit())
    for call in range(1, whole.step + STEPS):
        cut = walked_after_cut(fit(), call)
        assert cut.losses == whole.losses and cut.counts == whole.counts and torch.equal(cut.x, whole.x)
        assert all(torch.equal(a, b) for a, b in zip(cut.nulls, whole.nulls, strict=True))


def test_from_the_prompts_own_rows_guidance_has_no_error():
    """u = c: the guided step is the unguided one, so the first loss is the inversion's own error."""
    world = World()
    caption = torch.randn(1, 7, WIDTH, generator=torch.Generator().manual_seed(9))
    picture = world.denoiser.mean(caption)
    exact = invert(world.denoiser, picture, caption, world.sigmas, "fixed point", 60)
    losses = []
    for start in (caption, world.null):
        fit = NullText(world.denoiser, exact, world.sigmas, caption, start, NullTextSettings(7.5))
        fit.update()
        losses.append(fit.losses[0])
    assert losses[0] < 1e-8 < losses[1]


def test_a_landing_is_where_an_euler_step_ends():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 1, 4, 6, 5, generator=generator)
    for sigma, following in ((14.6, 9.0), (0.5, 0.03), (0.03, 0.0)):
        denoised = landing_prediction(x, sigma, target, following)
        torch.testing.assert_close(x + (following - sigma) * (x - denoised) / sigma, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(landing_prediction(x, 0.5, target, 0.0), target)


@pytest.mark.parametrize(
    ("sigma", "step"), [(14.6, 0), (10.0, 0), (9.0, 1), (9.0004, 1), (1.1, 1), (1.0, 2), (0.001, 2), (15.0, None)]
)
def test_every_level_belongs_to_the_step_that_begins_at_or_above_it(sigma, step):
    assert step_at(sigma, (14.6, 9.0, 1.0, 0.0)) == step


def test_below_the_last_level_there_is_no_step():
    assert step_at(0.01, (14.6, 9.0, 0.03)) is None
