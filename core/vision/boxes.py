"""Which of a detector's boxes are the subject. Boxes are [N, 4] tensors (left, top, right, bottom), in pixels.

torchvision, which comes with ComfyUI, has the arithmetic; it is imported where it is needed, so that one that does not
fit its torch stops these nodes alone.
"""

from __future__ import annotations

from torch import Tensor

BEST, LARGEST, ALL = "best", "largest", "all"
CHOICES = (BEST, LARGEST, ALL)
SAME = 0.8  # intersection over union from which two boxes are one detection


def distinct(boxes: Tensor, scores: Tensor) -> list[int]:
    """Indices of the boxes, best first, without those that overlap a better one (non-maximum suppression)."""
    from torchvision.ops import box_iou  # its nms is a compiled operator, which not every build has

    overlaps, kept = box_iou(boxes, boxes), []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(float(overlaps[index, other]) < SAME for other in kept):
            kept.append(index)
    return kept


def chosen(boxes: Tensor, scores: Tensor, rule: str) -> list[int]:
    """Which of some boxes are the subject: the one with the best score, the largest one, or all of them."""
    from torchvision.ops import box_area

    if rule == ALL:
        return list(range(len(boxes)))
    return [int((box_area(boxes) if rule == LARGEST else scores).argmax())]
