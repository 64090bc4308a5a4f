"""Measures against values known by hand and against slow formulas written independently."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from likeness.benchmarks.frame import interval
from likeness.core.vision.measures import (
    PSNR_OF_EQUAL,
    cosine,
    lpips,
    psnr,
    resize_mask,
    subject_crop,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def box_mask(top: int, bottom: int, left: int, right: int, side: int = 20) -> torch.Tensor:
    mask = torch.zeros(1, side, side)
    mask[:, top:bottom, left:right] = 1.0
    return mask


def test_cosine_of_known_angles():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    assert_close(cosine(a, torch.tensor([[3.0, 0.0]])), torch.tensor([1.0, math.sqrt(0.5), -1.0]))
    with pytest.raises(ValueError, match="one model"):
        cosine(a, torch.zeros(1, 3))


def test_psnr_of_a_known_difference():
    a = noise(2, 8, 8, 3) * 0.8
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert_close(psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0)
    assert_close(psnr(a, a), torch.full((2,), PSNR_OF_EQUAL))


def test_psnr_inside_and_outside_a_mask():
    a, mask = noise(1, 20, 20, 3) * 0.5, box_mask(5, 15, 5, 15)
    b = a + 0.1 * mask[..., None] + 0.01 * (1 - mask[..., None])
    assert_close(psnr(a, b, mask), torch.tensor([20.0]), atol=1e-3, rtol=0)
    assert_close(psnr(a, b, 1 - mask), torch.tensor([40.0]), atol=1e-3, rtol=0)
    by_hand = sum(float((a - b)[0, y, x, c]) ** 2 for y in range(5) for x in range(20) for c in range(3)) / 300
    top = box_mask(0, 5, 0, 20)
    assert float(psnr(a, b, top)) == pytest.approx(10 * math.log10(1 / by_hand), abs=1e-3)


def slow_lpips(a, b, heads, weight=None):
    """Place by place, as the paper writes it."""
    total = 0.0
    for a_l, b_l, w_l in zip(a, b, heads, strict=True):
        _, channels, height, width = a_l.shape
        place_sum, weight_sum = 0.0, 0.0
        for y in range(height):
            for x in range(width):
                u, v = a_l[0, :, y, x].double(), b_l[0, :, y, x].double()
                u, v = u / math.sqrt(float((u * u).sum())), v / math.sqrt(float((v * v).sum()))
                here = sum(float(w_l[c]) * float(u[c] - v[c]) ** 2 for c in range(channels))
                counts = 1.0
                if weight is not None:
                    ky, kx = weight.shape[1] // height, weight.shape[2] // width
                    counts = float(weight[0, y * ky : (y + 1) * ky, x * kx : (x + 1) * kx].mean())
                place_sum, weight_sum = place_sum + counts * here, weight_sum + counts
        total += place_sum / weight_sum
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_lpips_equals_a_slow_formula(weighted):
    a = [noise(1, 5, 6, 6, seed=1), noise(1, 7, 3, 3, seed=2)]
    b = [noise(1, 5, 6, 6, seed=3), noise(1, 7, 3, 3, seed=4)]
    heads = [noise(5, seed=5), noise(7, seed=6)]
    weight = 1 - box_mask(2, 8, 1, 9, side=12) if weighted else None
    assert float(lpips(a, b, heads, weight)) == pytest.approx(slow_lpips(a, b, heads, weight), rel=1e-5)
    assert float(lpips(a, a, heads, weight)) == 0.0


def test_lpips_is_differentiable():
    a = [noise(1, 3, 4, 4, seed=1).requires_grad_(True)]
    lpips(a, [noise(1, 3, 4, 4, seed=2)], [torch.ones(3)]).sum().backward()
    assert bool(torch.isfinite(a[0].grad).all()) and bool(a[0].grad.any())


def test_subject_crop_shows_only_the_subject_on_white():
    picture = torch.zeros(1, 20, 20, 3)
    picture[:, 4:10, 6:14] = torch.tensor([1.0, 0.0, 0.0])
    mask = box_mask(4, 10, 6, 14)
    crop = subject_crop(picture, mask, 8, margin=0.0)
    assert crop.shape == (1, 8, 8, 3)
    assert_close(crop[0, 4, 4], torch.tensor([1.0, 0.0, 0.0]), atol=1e-4, rtol=0)
    assert_close(crop[0, 0, 4], torch.ones(3), atol=1e-4, rtol=0)  # a wide subject has white above it
    other = picture.clone()
    other[:, :4] = 0.7  # what is not the subject changes nothing
    assert torch.equal(subject_crop(other, mask, 9), subject_crop(picture, mask, 9))


def test_subject_crop_follows_the_subject_and_reaches_beyond_the_border():
    patch = noise(6, 6, 3, seed=2)
    crops = []
    for top, left in ((7, 7), (0, 0), (14, 14), (0, 14)):
        picture, mask = torch.full((1, 20, 20, 3), 0.3), box_mask(top, top + 6, left, left + 6)
        picture[:, top : top + 6, left : left + 6] = patch
        crops.append(subject_crop(picture, mask, 12, margin=0.2))
    for crop in crops[1:]:
        assert_close(crop, crops[0])


def test_subject_crop_gradient_stays_on_the_subject():
    picture = noise(1, 20, 20, 3).requires_grad_(True)
    mask = box_mask(4, 10, 6, 14)
    subject_crop(picture, mask, 9).sum().backward()
    reached = (picture.grad.abs().sum(-1) > 0).float()
    assert_close(reached, mask)


def test_subject_crop_refuses_an_empty_or_unfit_mask():
    with pytest.raises(ValueError, match="image 1 is empty"):
        subject_crop(noise(2, 20, 20, 3), torch.cat([box_mask(4, 9, 4, 9), torch.zeros(1, 20, 20)]), 8)
    with pytest.raises(ValueError, match="does not fit"):
        subject_crop(noise(1, 20, 20, 3), torch.ones(1, 10, 10), 8)


def test_resized_mask_keeps_its_area():
    mask = box_mask(5, 15, 0, 20)
    assert torch.equal(resize_mask(mask, 20, 20), mask)
    assert float(resize_mask(mask, 60, 33).mean()) == pytest.approx(0.5, abs=0.01)
    assert float(resize_mask(mask, 5, 5).mean()) == pytest.approx(0.5, abs=0.05)


def test_interval_covers_a_known_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        sample = (0.3 + torch.randn(30, generator=generator)).tolist()
        found = interval(sample, resamples=400, seed=trial)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_clear_and_unclear_differences():
    clear = interval([0.2, 0.3, 0.1, 0.25, 0.15, -0.01])
    assert 0 < clear["low"] < clear["mean"] < clear["high"] and clear["share_won"] == pytest.approx(5 / 6)
    unclear = interval([0.2, -0.3, 0.1, -0.25, 0.15, -0.05])
    assert unclear["low"] < 0 < unclear["high"]
    assert interval([0.2, 0.3, 0.1]) == interval([0.2, 0.3, 0.1])
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least two finite"):
            interval(bad)
