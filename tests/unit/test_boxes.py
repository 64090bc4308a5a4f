"""Boxes of a detector: geometry, and which of them count."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from likeness.core.vision.boxes import ALL, BEST, LARGEST, areas, chosen, corners, distinct, inside, overlaps

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 50, 60], [5, 0, 15, 10]])


def test_corners_of_a_box_in_the_middle():
    assert_close(corners(torch.tensor([[0.5, 0.5, 0.5, 0.25]]), 80, 40), torch.tensor([[20.0, 15.0, 60.0, 25.0]]))


def test_what_leaves_the_picture_is_cut_off():
    cut = inside(torch.tensor([[-5.0, -1, 90, 30], [90, 0, 95, 10]]), 80, 40)
    assert_close(cut, torch.tensor([[0.0, 0, 80, 30], [80, 0, 80, 10]]))
    assert_close(areas(cut), torch.tensor([2400.0, 0.0]))


def test_overlaps():
    found = overlaps(BOXES)
    assert_close(found.diagonal(), torch.ones(4))
    assert_close(found[0], torch.tensor([1.0, 0.9, 0.0, 1 / 3]))


def test_a_box_on_a_better_one_is_the_same_find():
    assert distinct(BOXES, torch.tensor([0.5, 0.9, 0.7, 0.6])) == [1, 2, 3]
    assert distinct(BOXES[:0], torch.zeros(0)) == []


def test_choices():
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
    assert chosen(BOXES, scores, BEST) == [1] and chosen(BOXES, scores, LARGEST) == [2]
    assert chosen(BOXES, scores, ALL) == [0, 1, 2, 3]
