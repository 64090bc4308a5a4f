"""SINE (Zhang et al. 2023, arXiv 2212.04489), sec. 3.3: the pieces of an image that patch-based fine-tuning sees.

The image is squashed to a square of cells x cells, a cell being what one latent pixel covers. A patch is a rectangle
of whole cells, of any shape, resized to the training square. Which rectangle it was is told to the network by the
position map (position_map.py), so that size and shape of the image are learned apart from its content.

Source: the data set classes of the authors. Deviations, each with its reason:
- resized as floating point numbers, theirs in 8 bits: no rounding on the way;
- every patch is drawn from a generator of its own, so that the first n are the same however many are drawn;
- with a mask, a patch that shows nothing of the subject is drawn again: there would be nothing to learn from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fit.fit import step_generator

Box = tuple[int, int, int, int]  # y0, x0, y1, x1 in cells, the ends not included

SMALLEST = 0.1  # shortest side of a patch, as a fraction of the image's
TRIES = 100  # before a patch of a masked image is given up for the whole image


def draw_box(cells: int, uniform: Callable[[], float], at_most: Callable[[int], int]) -> Box:
    """A random rectangle of the grid; both sides are drawn independently.

    uniform() gives a number in [0, 1), at_most(n) an integer in 0 .. n. A side is never the whole grid, because the
    authors round down; the whole image is a case of its own.
    """
    height, width = (max(1, int(cells * (SMALLEST + (1 - SMALLEST) * uniform()))) for _ in range(2))
    top, left = at_most(cells - height), at_most(cells - width)
    return top, left, top + height, left + width


def box_of(seed: int, index: int, cells: int, whole_image: float, shows: Callable[[Box], bool] | None = None) -> Box:
    """The rectangle of the index-th patch; with probability whole_image the whole image.

    shows(box): whether anything of the subject is in it.
    """
    whole = (0, 0, cells, cells)
    generator = step_generator(seed, index, "patch")

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    def at_most(largest: int) -> int:
        return int(torch.randint(largest + 1, (), generator=generator))

    if uniform() < whole_image:
        return whole
    for _ in range(TRIES):
        box = draw_box(cells, uniform, at_most)
        if shows is None or shows(box):
            return box
    return whole


def squashed(images: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] as squares of size x size pixels, whatever their shape was.

    Bicubic, antialiased, first along the rows and cut to 0..1 before the columns: so does Pillow, which theirs uses.
    """
    images = images.float()
    for shape in ((images.shape[-2], size), (size, size)):
        images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0.0, 1.0)
    return images


def cut(square: Tensor, box: Box, cell: int, size: int) -> Tensor:
    """The rectangle of a square image [1, C, S, S], resized to size x size; cell: pixels of one cell."""
    top, left, bottom, right = (side * cell for side in box)
    return squashed(square[..., top:bottom, left:right], size)


def check_size(height: int, width: int, cells: int) -> None:
    """ValueError when an image has fewer pixels than the grid has cells: patches would show single pixels."""
    if min(height, width) < cells:
        raise ValueError(
            f"The image has {width} x {height} pixels, less than the {cells} x {cells} cells that patches are cut "
            "along: use a larger image, fewer cells, or switch 'patches' off."
        )
