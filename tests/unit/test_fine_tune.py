"""SINE's fine-tuning on a denoiser in closed form: the patches, the objective, its optimum, and its state."""

from __future__ import annotations

import pytest
import torch

from likeness.core.denoiser import Prompt, output_error
from likeness.core.fit.train import Checkpointer, Retention, train
from likeness.core.sine.fine_tune import FineTune, FineTuneSettings, Prior, Samples, recon_term
from likeness.core.sine.patches import box_of, check_size, cut, resize_to_square

from ..toy import GaussianDenoiser

WIDTH = 16


class Placed(GaussianDenoiser):
    """A Gaussian denoiser whose mean moves with a trained shift; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.shift = torch.nn.Parameter(torch.zeros(self.shape))
        self.asked: list = []

    def mean(self, context):
        return super().mean(context) + self.shift

    def denoised(self, x, sigma, context, pooled=None, boxes=None):
        self.asked.append((context, pooled, boxes))
        return super().denoised(x, sigma, context)


def make(samples: int = 3, prior: int = 0, **settings) -> FineTune:
    generator = torch.Generator().manual_seed(3)
    denoiser = Placed()
    prompt, other = (Prompt(torch.randn(1, 4, WIDTH, generator=generator)) for _ in range(2))
    x0 = torch.randn(samples + prior, *denoiser.shape, generator=generator)
    boxes = torch.arange(4 * samples).view(samples, 4)
    return FineTune(
        denoiser,
        Samples(x0[:samples], boxes),
        lambda: prompt,
        {"shift": denoiser.shift},
        FineTuneSettings(**{"learning_rate": 0.05, **settings}),
        Prior(Samples(x0[samples:]), lambda: other, denoiser) if prior else None,
    )


# Patches
# ------------------------------------------------------------------------------------------


def test_the_first_patches_do_not_depend_on_how_many_are_drawn_and_the_seed_decides_them():
    boxes = [box_of(0, i, 64, 0.0) for i in range(200)]
    assert boxes[:5] == [box_of(0, i, 64, 0.0) for i in range(5)]
    assert boxes != [box_of(1, i, 64, 0.0) for i in range(200)]
    assert all(0 <= y0 < y1 <= 64 and 0 <= x0 < x1 <= 64 for y0, x0, y1, x1 in boxes)
    assert len(set(boxes)) > 190 and (0, 0, 64, 64) not in boxes


def test_the_whole_picture_comes_as_often_as_asked():
    whole = [box_of(0, i, 32, 0.25) == (0, 0, 32, 32) for i in range(400)]
    assert 60 < sum(whole) < 140
    assert box_of(0, 7, 32, 1.0) == (0, 0, 32, 32)


def test_a_patch_that_shows_nothing_is_drawn_again():
    drawn = [box_of(0, i, 32, 0.0, lambda box: box[0] < 4) for i in range(30)]
    assert all(box[0] < 4 for box in drawn)
    assert box_of(0, 0, 32, 0.0, lambda _box: False) == (0, 0, 32, 32)


def test_a_box_is_rows_then_columns():
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 8:24, 40:48] = 1.0
    assert float(cut(picture, (1, 5, 3, 6), 8, 16).min()) > 0.999
    assert float(cut(picture, (5, 1, 6, 3), 8, 16).max()) == 0.0


def test_a_squashed_picture_keeps_its_mean_and_its_range():
    picture = torch.rand(2, 3, 50, 90, generator=torch.Generator().manual_seed(0))
    square = resize_to_square(picture, 32)
    assert square.shape == (2, 3, 32, 32) and float(square.min()) >= 0 and float(square.max()) <= 1
    assert abs(float(square.mean() - picture.mean())) < 0.01


def test_a_picture_smaller_than_the_grid_is_refused():
    check_size(64, 200, 64)
    with pytest.raises(ValueError, match="200 x 63 pixels.*64 x 64 cells.*larger image"):
        check_size(63, 200, 64)


# The objective
# ------------------------------------------------------------------------------------------


def test_second_term_is_the_weighted_distance_of_the_denoised_estimate():
    fit = make()
    x0 = fit.samples.x0[:2]
    t, noise = torch.tensor([150, 900]), torch.randn(2, *x0.shape[1:], generator=torch.Generator().manual_seed(5))
    error, denoised = output_error(fit.denoiser, x0, noise, fit.denoiser.sigmas[t], fit.prompt().context)
    by_hand = ((t / 1000) ** 2 * fit.denoiser.sigmas[t] * error.abs().mean((1, 2, 3))).mean()
    torch.testing.assert_close(recon_term(denoised, x0, t, 1000), by_hand)
    plain, _ = fit.loss(fit.prompt(), x0, t, noise)
    both, _ = fit.loss(fit.prompt(), x0, t, noise, recon_weight=0.5)
    torch.testing.assert_close(both, plain + 0.5 * by_hand)


def test_large_latents_are_pooled_to_64_and_small_ones_are_not():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(1, 4, 128, 128, generator=generator) for _ in range(2))
    pooled = (a - b).view(1, 4, 64, 2, 64, 2).mean((3, 5)).abs().mean() * 0.25
    torch.testing.assert_close(recon_term(a, b, torch.tensor([500]), 1000), pooled)
    frame = recon_term(a[:, :, None], b[:, :, None], torch.tensor([500]), 1000, torch.ones(1, 1, 1, 128, 128))
    torch.testing.assert_close(frame, pooled)
    small = recon_term(a[..., :64, :64], b[..., :64, :64], torch.tensor([500]), 1000)
    torch.testing.assert_close(small, (a - b)[..., :64, :64].abs().mean() * 0.25)


@pytest.mark.parametrize("side", [6, 128])
def test_a_mask_leaves_the_rest_out_of_both_terms(side):
    generator = torch.Generator().manual_seed(1)
    x0, denoised = (torch.randn(1, 4, side, side, generator=generator) for _ in range(2))
    mask = torch.zeros(1, 1, side, side)
    mask[..., : side // 2] = 1
    t = torch.tensor([1000])
    changed = denoised + 9 * (1 - mask)
    torch.testing.assert_close(recon_term(changed, x0, t, 1000, mask), recon_term(denoised, x0, t, 1000, mask))
    half = recon_term(denoised[..., : side // 2], x0[..., : side // 2], t, 1000)
    if side <= 64:
        torch.testing.assert_close(recon_term(denoised, x0, t, 1000, mask), half)
    fit = make()
    shape = (1, *fit.denoiser.shape)
    left = torch.zeros(1, 1, *shape[-2:])
    left[..., :2] = 1
    x0, noise, t = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), torch.tensor([300])
    masked, _ = fit.loss(fit.prompt(), x0, t, noise, mask=left)
    error, _ = output_error(fit.denoiser, x0, noise, fit.denoiser.sigmas[t], fit.prompt().context)
    torch.testing.assert_close(masked, error[..., :2].square().mean())


def test_samples_come_in_turn_with_their_boxes_whatever_the_number_of_steps():
    fit = make()
    for _ in range(5):
        fit.update()
    assert [asked[2].tolist() for asked in fit.denoiser.asked] == [
        fit.samples.boxes[[i]].tolist() for i in (0, 1, 2, 0, 1)
    ]


def test_the_optimum_is_the_mean_of_the_samples():
    fit = make(learning_rate=0.1)
    for _ in range(400):
        fit.update()
    target = fit.samples.x0.mean(0) - fit.denoiser.map.matmul(fit.prompt().context.mean(1)[0]).view(fit.denoiser.shape)
    assert float((fit.denoiser.shift.detach() - target).norm()) < 0.3 * float(target.norm())


def test_prior_pictures_pull_with_their_weight():
    plain, idle, pulled = (make(prior=2, prior_weight=weight) for weight in (0.0, 1e-12, 2.0))
    for fit in (plain, idle, pulled):
        for _ in range(3):
            fit.update()
    assert len(plain.denoiser.asked) == 3 and len(pulled.denoiser.asked) == 6
    torch.testing.assert_close(plain.denoiser.shift, idle.denoiser.shift)
    assert not torch.allclose(plain.denoiser.shift, pulled.denoiser.shift, atol=1e-3)
    own, other = pulled.denoiser.asked[:2]
    assert own[2] is not None and other[2] is None and not torch.equal(own[0], other[0])
    assert pulled.losses[0] > plain.losses[0]


def test_weights_decay_as_in_the_authors_optimiser():
    fit = make()
    group = fit.optimizer.param_groups[0]
    assert type(fit.optimizer) is torch.optim.AdamW
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 1e-2)


def test_a_loss_or_gradient_that_is_not_finite_changes_nothing():
    fit = make()
    fit.update()
    before = fit.denoiser.shift.detach().clone()
    fit.samples.x0[1] = float("nan")
    with pytest.raises(RuntimeError, match="step 2: nothing was updated"):
        fit.update()
    assert fit.step == 1 and torch.equal(before, fit.denoiser.shift.detach())


# State
# ------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt."""


def run(store, steps: int, cancel_at: int | None = None, keep: int | None = None):
    fit = make(prior=2, prior_weight=0.5)

    def on_update(_denoised):
        if fit.step == cancel_at:
            raise Cancelled

    def result():
        return {"shift.a": fit.denoiser.shift.detach().clone(), "shift.b": -fit.denoiser.shift.detach()}

    return fit, train(fit, steps, result, Checkpointer(store, "key", {}, Retention(3, keep)), on_update)


@pytest.mark.parametrize("keep", [None, 2, 1])
@pytest.mark.parametrize("cancel_at", [1, 4])
def test_cancelled_and_resumed_equals_uninterrupted(tmp_path, cancel_at, keep):
    from likeness.core.fit.runs import RunStore

    whole_fit, whole = run(RunStore(tmp_path / "whole"), 8, keep=keep)
    store = RunStore(tmp_path / "stopped")
    with pytest.raises(Cancelled):
        run(store, 8, cancel_at, keep)
    fit, resumed = run(store, 8, keep=keep)
    assert resumed.losses == whole.losses and len(fit.denoiser.asked) == 2 * (8 - cancel_at)
    assert resumed.results[8].keys() == {"shift.a", "shift.b"}
    assert all(torch.equal(resumed.results[8][name], whole.results[8][name]) for name in resumed.results[8])
    a, b = (each.optimizer.state_dict()["state"][0] for each in (fit, whole_fit))
    assert all(torch.equal(a[name], b[name]) for name in a)
    if keep is not None:
        assert len(resumed.results) <= keep
