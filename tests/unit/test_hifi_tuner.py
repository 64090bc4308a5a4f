"""HiFi Tuner's objective and its step-wise refinement, on a denoiser in closed form."""

from __future__ import annotations

import torch

from likeness.core.embedding.hifi_tuner import Regularizer, StepWise, StepWiseSettings
from likeness.core.embedding.hiper import HiPer, HiPerSettings
from likeness.core.prompt.conditioning import with_tail

from ..toy import GaussianDenoiser

WIDTH, TOKENS, SIGMAS = 16, 3, (9.0, 3.0, 1.0, 0.3)


def world():
    generator = torch.Generator().manual_seed(11)
    denoiser = GaussianDenoiser(WIDTH)
    context = torch.randn(1, 77, WIDTH, generator=generator)
    return denoiser, denoiser.mean(torch.randn(1, 4, WIDTH, generator=generator)), context


def eq6(weight: float, decoupled: bool = False, steps: int = 200) -> HiPer:
    denoiser, x0, context = world()
    start = context[0, -TOKENS:]
    settings = HiPerSettings(tokens=TOKENS, learning_rate=0.05, t_low=300)
    fit = HiPer(denoiser, x0, context, start, settings, regularizer=Regularizer(start.clone(), weight, decoupled))
    for _ in range(steps):
        fit.update()
    return fit


def drift(fit: HiPer) -> float:
    return float((fit.h.detach() - fit.regularizer.rows).norm())


def test_without_weight_it_is_hiper():
    denoiser, x0, context = world()
    plain = HiPer(denoiser, x0, context, context[0, -TOKENS:], eq6(0.0, steps=0).settings)
    for _ in range(10):
        plain.update()
    assert torch.equal(plain.h, eq6(0.0, steps=10).h)


def test_the_anchor_holds_the_rows_more_the_more_it_weighs_in_both_forms():
    free = drift(eq6(0.0))
    assert drift(eq6(10.0)) < drift(eq6(0.01)) < free
    assert drift(eq6(5.0, decoupled=True)) < drift(eq6(0.5, decoupled=True)) < free


def test_the_first_loss_has_both_terms():
    denoiser, x0, context = world()
    start = context[0, -TOKENS:]
    settings = HiPerSettings(tokens=TOKENS)
    plain = HiPer(denoiser, x0, context, start, settings)
    held = HiPer(denoiser, x0, context, start, settings, regularizer=Regularizer(start + 2.0, 0.25))
    torch.testing.assert_close(held.loss(*held.draw())[0], plain.loss(*plain.draw())[0] + 0.25 * 4.0)


def step_wise(inner: int = 4, learning_rate: float = 0.02, regularizer: Regularizer | None = None) -> StepWise:
    denoiser, x0, context = world()
    settings = StepWiseSettings(inner, learning_rate)
    return StepWise(SIGMAS, denoiser, x0, context, context[0, -TOKENS:], settings, regularizer=regularizer)


def test_every_step_takes_over_from_the_one_before_and_is_asked_at_its_own_level():
    fit = step_wise()
    levels, denoised = [], fit.denoiser.denoised

    def record(x, sigma, context):
        levels.append(float(sigma))
        return denoised(x, sigma, context)

    fit.denoiser.denoised = record
    starts = []
    for _ in range(len(SIGMAS)):
        starts.append(fit.h.detach().clone())
        for _ in range(4):
            fit.update()
    assert torch.tensor(levels).tolist() == torch.tensor([s for s in SIGMAS for _ in range(4)]).tolist()
    rows = fit.rows()
    assert rows.shape == (len(SIGMAS), TOKENS, WIDTH)
    assert all(torch.equal(starts[i + 1], rows[i]) for i in range(len(SIGMAS) - 1))
    assert not any(torch.equal(rows[i], rows[i + 1]) for i in range(len(SIGMAS) - 1))


def test_refining_explains_the_picture_better():
    fit = step_wise(inner=60)
    before = fit.h.detach().clone()

    def distance(rows):
        return float((fit.denoiser.mean(with_tail(fit.context, rows)) - fit.x0).norm())

    for _ in range(60 * len(SIGMAS)):
        fit.update()
    assert distance(fit.rows()[-1]) < 0.8 * distance(before)


def test_stopped_and_resumed_is_never_stopped():
    regularizer = Regularizer(world()[2][0, -TOKENS:], 0.1)
    whole, stopped, resumed = (step_wise(regularizer=regularizer) for _ in range(3))
    for _ in range(16):
        whole.update()
    for _ in range(6):
        stopped.update()
    half = stopped.rows()
    assert torch.equal(half[2], half[3]), "steps that were not reached have the last rows"
    resumed.restore(stopped.state())
    for _ in range(10):
        resumed.update()
    assert torch.equal(whole.rows(), resumed.rows()) and whole.losses == resumed.losses
