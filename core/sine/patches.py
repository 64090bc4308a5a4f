"""SINE (Zhang et al. 2023, arXiv 2212.04489), sec. 3.3: image patches for patch-based fine-tuning.

The image is resized to a square of cells x cells; a cell is the area of one latent pixel. A patch is a rectangle of
whole cells, of any shape, resized to the training square. The position map (position_map.py) tells the network which
rectangle it is, so that the image's size and shape are learned apart from its content.

Source: the dataset classes of the reference code. Deviations, each with its reason:
- patches are resized in floating point, in 8 bits in the reference code: no intermediate rounding;
- every patch is drawn from its own generator, so that the first n do not depend on how many are drawn;
- with a mask, a patch that shows nothing of the subject is drawn again, since there is nothing to learn from it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fit.fit import step_generator

Box = tuple[int, int, int, int]  # y0, x0, y1, x1 in cells, ends exclusive

SMALLEST = 0.1  # minimum side of a patch, as a fraction of the image's
TRIES = 100  # draws for a patch of a masked image before the whole image is used


def draw_box(cells: int, uniform: Callable[[], float], at_most: Callable[[int], int]) -> Box:
    """A random rectangle of the grid; both sides are drawn independently.

    uniform() returns a number in [0, 1), at_most(n) an integer in 0 .. n. A side never spans the whole grid, because
    the reference code rounds down; the whole image is a separate case.
    """
    height, width = (max(1, int(cells * (SMALLEST + (1 - SMALLEST) * uniform()))) for _ in range(2))
    top, left = at_most(cells - height), at_most(cells - width)
    return top, left, top + height, left + width


def box_of(seed: int, index: int, cells: int, whole_image: float, shows: Callable[[Box], bool] | None = None) -> Box:
    """The rectangle of the index-th patch; the whole image with probability whole_image.

    shows(box): whether the box contains any part of the subject.
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


def resize_to_square(images: Tensor, size: int) -> Tensor:
    """Resize images [B, C, H, W] to size x size pixels, ignoring their aspect ratio.

    Bicubic and antialiased, along the rows first and clamped to 0..1 before the columns, as in Pillow, which the
    reference code uses.
    """
    images = images.float()
    for shape in ((images.shape[-2], size), (size, size)):
        images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).clamp(0.0, 1.0)
    return images


def cut(square: Tensor, box: Box, cell: int, size: int) -> Tensor:
    """Cut a box out of a square image [1, C, S, S] and resize it to size x size; cell: pixels per cell."""
    top, left, bottom, right = (side * cell for side in box)
    return resize_to_square(square[..., top:bottom, left:right], size)


def check_size(height: int, width: int, cells: int) -> None:
    """ValueError when an image has fewer pixels than the grid has cells, so that patches would show single pixels."""
    if min(height, width) < cells:
        raise ValueError(
            f"The image has {width} x {height} pixels, less than the {cells} x {cells} cells that patches are cut "
            "along: use a larger image, fewer cells, or switch 'patches' off."
        )
