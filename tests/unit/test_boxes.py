"""Boxes of a detector: which of them count."""

from __future__ import annotations

import torch

from likeness.core.vision.boxes import ALL, BEST, LARGEST, select_boxes, suppress_overlaps

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 50, 60], [5, 0, 15, 10]])


def test_a_box_on_a_better_one_is_the_same_find():
    assert suppress_overlaps(BOXES, torch.tensor([0.5, 0.9, 0.7, 0.6])) == [1, 2, 3]
    assert suppress_overlaps(BOXES[:0], torch.zeros(0)) == []


def test_choices():
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
    assert select_boxes(BOXES, scores, BEST) == [1] and select_boxes(BOXES, scores, LARGEST) == [2]
    assert select_boxes(BOXES, scores, ALL) == [0, 1, 2, 3]
