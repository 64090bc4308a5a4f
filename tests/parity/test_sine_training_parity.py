"""SINE's fine-tuning against the numbers of the authors' code: the boxes and the images in them."""

from __future__ import annotations

import random

import pytest
import torch

from likeness.core.sine.patches import cut, draw_box, resize_to_square

from .unets import arrays

LEVEL = 1 / 127.5  # one 8-bit level of an image in -1..1


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("sine.npz", without=("w1_crash", "ds_caption"))


def python_box(numbers: random.Random, cells: int = 128):
    return draw_box(cells, numbers.random, lambda largest: numbers.randint(0, largest))


def test_boxes_are_drawn_as_by_the_authors_data_set(official):
    """With Python's generator, which their data set also asks for a flip, the coin and the prompt's template."""
    numbers = random.Random(0)
    numbers.random()
    for expected in official["ds_boxes_seed0"].tolist():
        numbers.random()
        assert list(python_box(numbers)) == expected
        numbers.choice([0])


def test_sides_are_12_to_127_cells(official):
    numbers = random.Random(1)
    boxes = torch.tensor([python_box(numbers) for _ in range(20_000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert [int(sides.min()), int(sides.max())] == official["ds_size_minmax"].tolist()
    assert int(boxes.min()) == 0 and int(boxes.max()) == 128


def test_a_patch_has_the_official_pixels(official):
    """Theirs are rounded to 8 bits after the squash and after the cut, ours are not: two levels at most."""
    source = official["ds_src"].permute(2, 0, 1)[None] / 255
    found = (
        cut(resize_to_square(source, 128), tuple(official["ds_small_box"].tolist()), 8, 64)[0].permute(1, 2, 0) * 2 - 1
    )
    difference = (found - official["ds_small_img"]).abs()
    assert float(difference.max()) < 2 * LEVEL and float(difference.mean()) < LEVEL / 2
