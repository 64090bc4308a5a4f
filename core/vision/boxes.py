"""Boxes of a detector: corners, overlap, and which of them belong to the subject.

Boxes are [N, 4] tensors (left, top, right, bottom), in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

BEST, LARGEST, ALL = "best", "largest", "all"
CHOICES = (BEST, LARGEST, ALL)
SAME = 0.8  # overlap from which two boxes are one find


def corners(boxes: Tensor, width: float, height: float) -> Tensor:
    """(centre x, centre y, width, height) as fractions -> corners in pixels, inside the picture."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    size = torch.tensor([width, height]).to(boxes)
    return torch.cat([(centre - half) * size, (centre + half) * size], 1)


def inside(boxes: Tensor, width: float, height: float) -> Tensor:
    """The boxes, cut at the picture's border."""
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]).to(boxes))


def areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of each box with each other, [N, N]."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return shared / (areas(boxes)[:, None] + areas(boxes)[None] - shared).clamp(min=1e-9)


def distinct(boxes: Tensor, scores: Tensor) -> list[int]:
    """Indices of the boxes, best first, without those that lie on a better one (detectors say one thing twice)."""
    shared, kept = overlaps(boxes), []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(float(shared[index, other]) < SAME for other in kept):
            kept.append(index)
    return kept


def chosen(boxes: Tensor, scores: Tensor, rule: str) -> list[int]:
    """Which of some boxes are the subject: the one with the best score, the largest one, or all of them."""
    if rule == ALL:
        return list(range(len(boxes)))
    return [int((areas(boxes) if rule == LARGEST else scores).argmax())]
