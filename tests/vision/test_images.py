"""The one rule for images and masks that all nodes share."""

from __future__ import annotations

import pytest
import torch

from likeness.core.session.images import check_image, checked_mask


def half(rows: int, columns: int) -> torch.Tensor:
    mask = torch.zeros(rows, columns)
    mask[: rows // 2] = 1
    return mask


@pytest.mark.parametrize("shape", [(40, 60), (1, 40, 60), (1, 1, 40, 60)])
def test_a_mask_of_every_rank_becomes_rows_columns(shape):
    assert checked_mask(half(40, 60).view(shape), 3, (40, 60)).shape == (1, 40, 60)


@pytest.mark.parametrize("size", [(400, 600), (401, 600), (50, 75), (392, 600)])
def test_rounding_to_pixels_and_cells_is_no_other_proportion(size):
    assert checked_mask(half(400, 600), 1, size).shape == (1, 400, 600)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 40, 60), "2 masks came with 3 images .'m'.: give one mask, or one for each"),
        (torch.zeros(40, 60), "The m is empty, expected white.*paint the subject"),
        (torch.stack([half(40, 60), torch.zeros(40, 60), half(40, 60)]), "The m is empty"),
        (half(40, 64), "The m has 64 x 40 pixels, its image 60 x 40.*connect the mask"),
        (torch.ones(40, 60), "The m covers the whole image, expected black.*: leave some"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_given_expected_and_remedy(mask, message):
    with pytest.raises(ValueError, match=message):
        checked_mask(mask, 3, (40, 60), name="m", full="leave some")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(8, 8, 3), r"photo has shape \(8, 8, 3\), expected \[batch, height, width, 3\].*connect"),
        (torch.zeros(0, 8, 8, 3), "photo has shape"),
        (torch.zeros(1, 8, 8, 1), "photo has shape.*with colour"),
        (
            torch.full((1, 8, 8, 3), float("inf")),
            "'photo' holds NaN or infinite numbers.*make the image again",
        ),
    ],
)
def test_an_image_that_is_none_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        check_image(image, "photo")
