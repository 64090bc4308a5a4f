"""Select the subject among a detector's boxes. Boxes are [N, 4] tensors (left, top, right, bottom) in pixels.

The arithmetic is torchvision's, which comes with ComfyUI; it is imported lazily, so that a build that does not match
torch only breaks these nodes.
"""

from torch import Tensor

BEST, LARGEST, ALL = "best", "largest", "all"
CHOICES = (BEST, LARGEST, ALL)
SAME = 0.8  # intersection over union from which two boxes count as one detection


def suppress_overlaps(boxes: Tensor, scores: Tensor) -> list[int]:
    """Indices of the boxes, best first, without those that overlap a better one (non-maximum suppression)."""
    from torchvision.ops import box_iou  # torchvision's nms is a compiled operator, which not every build has

    overlaps, indices = box_iou(boxes, boxes), []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(float(overlaps[index, other]) < SAME for other in indices):
            indices.append(index)
    return indices


def select_boxes(boxes: Tensor, scores: Tensor, rule: str) -> list[int]:
    """Indices of the boxes that are the subject: the one with the best score, the largest one, or all."""
    from torchvision.ops import box_area

    if rule == ALL:
        return list(range(len(boxes)))
    return [int((box_area(boxes) if rule == LARGEST else scores).argmax())]
