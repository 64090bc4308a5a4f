"""HiPer on a denoiser in closed form: the objective, its optimum, and what a run depends on."""

from __future__ import annotations

import pytest
import torch

from likeness.core.denoiser import latent_mask, masked_mean, output_error, timestep_range
from likeness.core.embedding.hiper import HiPer, HiPerSettings
from likeness.core.prompt.conditioning import with_tail

from ..toy import GaussianDenoiser

WIDTH, TOKENS = 16, 3


def make(seed: int = 0, images: int = 1, mask: torch.Tensor | None = None, **settings) -> HiPer:
    generator = torch.Generator().manual_seed(11)
    denoiser = GaussianDenoiser(WIDTH)
    context = torch.randn(1, 77, WIDTH, generator=generator)
    x0 = denoiser.mean(torch.randn(images, 4, WIDTH, generator=generator))
    return HiPer(denoiser, x0, context, context[0, -TOKENS:], HiPerSettings(tokens=TOKENS, seed=seed, **settings), mask)


def distance(fit: HiPer) -> float:
    return float((fit.denoiser.mean(with_tail(fit.context, fit.h.detach())) - fit.x0).norm())


def draw_at(fit: HiPer, step: int):
    fit.losses = [0.0] * step
    return fit.draw()


def test_only_the_tail_changes():
    fit = make()
    context = with_tail(fit.context, fit.h + 1)
    assert torch.equal(context[:, :-TOKENS], fit.context[:, :-TOKENS])
    assert torch.allclose(context[:, -TOKENS:], fit.context[:, -TOKENS:] + 1)


def test_noise_error_is_predicted_minus_true_noise():
    fit = make()
    x0, noise, sigma = (
        fit.x0,
        torch.randn(fit.x0.shape, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.7]),
    )
    error, denoised = output_error(fit.denoiser, x0, noise, sigma, fit.context)
    x = x0 + 0.7 * noise
    assert torch.allclose(error, (x - denoised) / 0.7 - noise, atol=1e-5)


def test_training_finds_the_rows_that_explain_the_picture():
    fit, idle = make(learning_rate=0.05, t_low=300), make(learning_rate=1e-9, t_low=300)
    before = distance(fit)
    for _ in range(400):
        fit.update()
        idle.update()
    assert distance(fit) < 0.4 * before
    # the same draws without learning: timestep and noise alone move the loss more than training does
    assert sum(fit.losses[-100:]) < 0.9 * sum(idle.losses[-100:])


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    first, second, other = make(3), make(3), make(4)
    for fit in (first, second, other):
        for _ in range(5):
            fit.update()
    assert torch.equal(first.h, second.h) and first.losses == second.losses
    assert not torch.equal(first.h, other.h)
    assert torch.equal(state, torch.get_rng_state())


def test_restored_state_goes_on_bit_for_bit():
    whole, stopped = make(), make()
    for _ in range(9):
        whole.update()
    for _ in range(4):
        stopped.update()
    resumed = make()
    resumed.restore(stopped.state())
    for _ in range(5):
        resumed.update()
    assert torch.equal(whole.h, resumed.h) and whole.losses == resumed.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), resumed.state().values(), strict=True))


def test_an_update_that_is_cut_off_leaves_no_trace():
    whole, cut = make(), make()
    for _ in range(3):
        whole.update()
        cut.update()
    denoised = cut.denoiser.denoised

    def interrupted(*_args):
        raise KeyboardInterrupt

    cut.denoiser.denoised = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.update()
    cut.denoiser.denoised = denoised
    whole.update()
    cut.update()
    assert torch.equal(whole.h, cut.h) and whole.losses == cut.losses


def test_timesteps_stay_in_their_window():
    fit = make(t_low=200, t_high=400)
    drawn = [int(draw_at(fit, step)[1]) for step in range(300)]
    assert min(drawn) >= 200 and max(drawn) <= 400 and len(set(drawn)) > 100


def test_every_picture_of_a_batch_is_learned_from():
    fit = make(images=3)
    assert {draw_at(fit, step)[0] for step in range(60)} == {0, 1, 2}


def test_mask_takes_the_rest_of_the_picture_out_of_the_loss():
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., :3, :] = 1
    fit = make(mask=mask)
    noise, t = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(2)), torch.tensor([500])
    before, _ = fit.loss(0, t, noise)
    fit.x0 = fit.x0.clone()
    fit.x0[..., 3:, :] += 5
    # the closed-form denoiser treats every element by itself, so a change outside of the mask cannot reach the inside
    assert torch.allclose(before, fit.loss(0, t, noise)[0], atol=1e-6)
    fit.x0[..., :3, :] += 1
    assert not torch.allclose(before, fit.loss(0, t, noise)[0], atol=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_rows_are_spoilt():
    fit = make()
    fit.update()
    kept = fit.h.detach().clone()
    fit.x0 = fit.x0 * float("nan")
    with pytest.raises(RuntimeError, match="step 2.*Lower the learning rate"):
        fit.update()
    assert torch.equal(fit.h, kept) and fit.step == 1


def test_a_gradient_that_is_not_finite_stops_before_the_rows_are_spoilt():
    fit = make()
    fit.update()
    kept, denoised = fit.h.detach().clone(), fit.denoiser.denoised
    # zero in value, without a slope at that point
    fit.denoiser.denoised = lambda x, s, c: denoised(x, s, c) + (c - c.detach()).abs().sum().sqrt()
    with pytest.raises(RuntimeError, match="gradient became nan at step 2"):
        fit.update()
    assert torch.equal(fit.h, kept) and fit.step == 1


def test_masked_mean_counts_channels():
    error = torch.ones(1, 4, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert float(masked_mean(error * 3, mask)) == 3.0
    assert float(masked_mean(error * 3, None)) == 3.0


def test_latent_mask_halves_and_keeps_thin_subjects():
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :9] = 1
    assert latent_mask(mask, 2, 2).tolist() == [[[[1, 0], [1, 0]]]]
    thin = torch.zeros(1, 16, 16)
    thin[:, :, 3] = 1
    assert latent_mask(thin, 2, 2).tolist() == [[[[1, 0], [1, 0]]]]
    with pytest.raises(ValueError, match="mask is empty"):
        latent_mask(torch.zeros(1, 16, 16), 2, 2)


def test_windows_in_percent():
    assert timestep_range(1000, 0.0, 1.0) == (0, 999)
    assert timestep_range(1000, 0.4, 1.0) == (0, 599)
    for start, end in ((0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="start below the end"):
            timestep_range(1000, start, end)
