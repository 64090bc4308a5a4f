"""The reference image: which one is chosen, and how it is aligned with another."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from likeness.core.reference.alignment import matrices, warp
from likeness.core.reference.host.alignment import LITERAL, SYMMETRIC, align_reference, choose_reference
from likeness.core.vision.host.vision import load_vision

from .models import dino_folder, pictures


@pytest.fixture
def vision(tmp_path):
    dino_folder(tmp_path / "dino")
    return load_vision(tmp_path / "dino")


def wedge(height: int = 64, width: int = 64) -> torch.Tensor:
    """A mask without symmetry [1, H, W]."""
    mask = torch.zeros(1, height, width)
    for row in range(20, 44):
        mask[0, row, 24 : 26 + (row - 18) // 2] = 1
    return mask


def scene(mask: torch.Tensor) -> torch.Tensor:
    """Red subject on a blue ground."""
    red, blue = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    return mask[..., None] * red + (1 - mask[..., None]) * blue


def test_the_most_similar_picture_is_taken(vision):
    images = pictures(5, seed=1)
    for wanted in (0, 3):
        near = (images[wanted : wanted + 1] + 0.02 * pictures(1, seed=9)).clamp(0, 1)
        index, similarity, info = choose_reference(images, near, vision, None)
        assert index == wanted and 0.9 < similarity <= 1.0001
        assert info.splitlines()[wanted].endswith("(taken)") and "Dinov2Model" in info


def test_bad_input_of_the_choice(vision):
    with pytest.raises(ValueError, match="2 generated images were given, one is expected"):
        choose_reference(pictures(3), pictures(2), vision, None)
    with pytest.raises(ValueError, match="1 masks came with 3 candidates: give one for each"):
        choose_reference(pictures(3), pictures(1), vision, torch.ones(1, 40, 40))


def test_a_picture_is_laid_on_the_mask():
    """In a node's own mode: ComfyUI runs nodes under inference mode."""
    with torch.inference_mode():
        mask = wedge()
        matrix = matrices(torch.tensor([[math.log(1.3), math.radians(35), 0.1, -0.05]]))[0]
        target = (warp(mask[None], matrix, (96, 80), "zeros")[0] > 0.5).float()
        image, aligned, iou, overlay, text = align_reference(scene(mask), mask, target, SYMMETRIC, 180.0)
    assert image.shape == overlay.shape == (1, 96, 80, 3) and aligned.shape == (1, 96, 80)
    assert iou > 0.9
    inside = (target > 0.5) & (aligned > 0.5)
    assert_close(image[inside].mean(0), torch.tensor([0.9, 0.1, 0.1]), atol=0.06, rtol=0)
    assert_close(image[:, :4].mean((0, 1, 2)), torch.tensor([0.1, 0.1, 0.8]), atol=1e-3, rtol=0)  # the border
    assert "scale 1.3" in text or "scale 1.2" in text
    assert text.startswith("scale") and f"IoU {iou:.3f} (symmetric)" in text


def test_the_printed_form_shrinks():
    mask = wedge()
    matrix = matrices(torch.tensor([[math.log(1.5), 0.0, 0.0, 0.0]]))[0]
    target = (warp(mask[None], matrix, (64, 64), "zeros")[0] > 0.5).float()
    _, _, symmetric, *_ = align_reference(scene(mask), mask, target, SYMMETRIC, 180.0)
    _, shrunk, literal, *_ = align_reference(scene(mask), mask, target, LITERAL, 180.0)
    assert symmetric > 0.9 > 0.8 > literal and float(shrunk.sum()) < 0.8 * float(target.sum())


def test_masks_of_another_size_are_fitted_to_the_picture():
    mask = wedge()
    half = torch.nn.functional.interpolate(mask[None], (32, 32))[0]
    image, _, iou, *_ = align_reference(scene(mask), half, mask, SYMMETRIC, 0.0)
    assert iou > 0.85 and image.shape == (1, 64, 64, 3)


def test_a_mask_of_the_surroundings_is_turned_over():
    subject = torch.zeros(1, 64, 64)
    subject[:, 20:, 6:] = 1.0  # cut off by two edges, as a person in a photo
    cut_out, surroundings = (
        align_reference(scene(wedge()), each, wedge(), SYMMETRIC, 0.0) for each in (subject, 1 - subject)
    )
    assert all(torch.equal(one, other) for one, other in zip(cut_out[:2], surroundings[:2], strict=True))


@pytest.mark.parametrize(
    ("mask", "target", "expected"),
    [
        (torch.zeros(1, 64, 64), wedge(), "The mask is empty"),
        (wedge(), torch.zeros(1, 64, 64), "The target_mask is empty"),
        (torch.ones(1, 64, 64), wedge(), "The mask covers the whole image"),
        (wedge(), torch.ones(64, 64), "The target_mask covers the whole image"),
        (wedge().expand(2, -1, -1), wedge(), "2 were given as mask, one is expected"),
        (wedge()[:, :32], wedge(), "The mask has 64 x 32 pixels, its image 64 x 64, which is another proportion"),
    ],
)
def test_bad_masks(mask, target, expected):
    with pytest.raises(ValueError, match=expected):
        align_reference(scene(wedge()), mask, target, SYMMETRIC, 180.0)
