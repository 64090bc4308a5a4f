"""Laying one mask on another: random transforms are found again, and the literal form shrinks."""

from __future__ import annotations

import math

import pytest
import torch

from likeness.core.reference.alignment import align, matrices, overlap, warp


def shape(index: int, side: int = 64) -> torch.Tensor:
    """A blob without symmetry in the middle of the frame: ellipses of different sizes, grown together."""
    generator = torch.Generator().manual_seed(100 + index)
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    found = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(3):
        cx, cy, a, b, angle = torch.rand(5, generator=generator).tolist()
        cx, cy, a, b = 0.3 * (cx - 0.5), 0.3 * (cy - 0.5), 0.1 + 0.15 * a, 0.1 + 0.25 * b
        u = (x - cx) * math.cos(3 * angle) + (y - cy) * math.sin(3 * angle)
        v = (y - cy) * math.cos(3 * angle) - (x - cx) * math.sin(3 * angle)
        found |= (u / a) ** 2 + (v / b) ** 2 < 1
    return found.float()


def transformed(index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A shape, the same through a random similarity (scale 0.6 to 1.6, up to 60 degrees, inside the frame), and it."""
    generator = torch.Generator().manual_seed(index)
    reference = shape(index)
    while True:
        scale, angle, dx, dy = torch.rand(4, generator=generator).tolist()
        theta = [math.log(0.6 + scale), math.radians(120 * angle - 60), dx - 0.5, dy - 0.5]
        matrix = matrices(torch.tensor([theta]))[0]
        target = (warp(reference[None, None], matrix, (64, 64), "zeros")[0, 0] > 0.5).float()
        inside = not (target[[0, -1]].any() or target[:, [0, -1]].any())
        if inside and int(target.sum()) >= 64:
            return reference, target, matrix


def test_random_similarities_are_found():
    found = []
    for index in range(4):
        reference, target, _ = transformed(index)
        found.append(align(reference, target).iou)
    assert sum(iou >= 0.9 for iou in found) >= 0.95 * len(found), sorted(found)[:6]


def test_scale_and_angle_are_those_that_were_applied():
    reference, target, matrix = transformed(3)
    found = align(reference, target)
    assert found.scale == pytest.approx(float(matrix[:, :2].norm()) / math.sqrt(2), rel=0.05)
    assert found.degrees == pytest.approx(math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])), abs=4)
    assert overlap(reference, target, found.matrix) == found.iou


def test_the_literal_form_shrinks_into_the_target():
    """As printed, the algorithm has no reason to fill the target: documented, and not the default."""
    reference = shape(1)
    matrix = matrices(torch.tensor([[math.log(1.4), 0.0, 0.05, 0.0]]))[0]
    target = (warp(reference[None, None], matrix, (64, 64), "zeros")[0, 0] > 0.5).float()
    literal, ours = align(reference, target, literal=True), align(reference, target)
    assert literal.scale < 1.1 < 1.3 < ours.scale and literal.iou < 0.8 < 0.9 < ours.iou


def test_frames_of_different_shape():
    """A subject of a wide image laid on one of a tall image keeps its proportions."""
    wide, tall = torch.zeros(48, 96), torch.zeros(96, 48)
    wide[16:32, 30:60] = 1
    tall[40:56, 9:39] = 1
    found = align(wide, tall)
    assert found.iou > 0.9 and found.scale == pytest.approx(1.0, rel=0.05)
    shown = warp(wide[None, None], found.matrix, (96, 48), "zeros")[0, 0]
    assert abs(int((shown > 0.5).sum()) - 480) < 40


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="target mask has 0 set pixels"):
        align(shape(0), torch.zeros(64, 64))


def test_what_fits_at_many_angles_stays_upright():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x**2 + y**2) < 0.3).float()
    moved = (((x - 0.2) ** 2 + (y + 0.1) ** 2) < 0.2).float()
    angle = torch.atan2(y, x)
    star = ((x**2 + y**2).sqrt() < 0.5 + 0.2 * torch.cos(5 * angle)).float()
    for reference, target in ((disc, moved), (star, star.roll((3, -4), (0, 1)))):
        found = align(reference, target, max_degrees=60.0)
        assert found.iou > 0.9 and abs(found.degrees) < 10
