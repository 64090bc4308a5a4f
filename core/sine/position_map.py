"""SINE (Zhang et al. 2022, arXiv 2212.04489), section 3.3: the map that tells the network a patch's place in the image.

The paper describes a Fourier embedding of v = [h1, w1, h2, w2]. The reference code, with which the paper's models are
trained, adds something else to the first convolution's output: a sinusoid of the integer index of every cell of 8
pixels, half of the channels for the column (x) and half for the row (y). A patch gets the part of the grid that its box
covers, resized to its latent; no box means the whole grid. Nothing in it is learned.

Source: ldm/modules/position_encoding.py and UNetModelPatch of the reference code. Its `center_shift` has no effect, and
it silently rebuilds its table for grids of more than 128 rows; both are left out here.

Transformers have no first convolution. Where their rotary positions can be moved, these say the same: the tokens of a
patch get the positions that they have in the whole image, at one latent pixel for each cell (not in the paper).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 128  # per side: 1024 pixels in cells of 8, from which patches are cut and resized to 512 pixels
INTERPOLATIONS = ("bilinear", "nearest")  # the reference configurations for photographs and for paintings
MAX_CELLS = 1024
BASE = 10_000.0
MARKER = "likeness.needs_position_map"  # in files of weights trained with a map: [cells, interpolation]


def sinusoids(cells: int, channels: int) -> Tensor:
    """[cells, channels] float32: row p - 1 is [sin(p f_0) .. sin(p f_(m-1)), cos(p f_0) .. cos(p f_(m-1))] for the
    position p = 1 .. cells, with m = channels / 2 and f_i = BASE^(-i / (m - 1)).
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(BASE) / max(half - 1, 1)))
    angles = torch.arange(1, cells + 1, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_map(
    channels: int, cells: int, boxes: Tensor, size: tuple[int, int], interpolation: str = "bilinear"
) -> Tensor:
    """The maps [B, channels, h, w] float32 of boxes [B, 4], each (y0, x0, y1, x1) in cells, for latents of size (h, w).

    The maps are on the device of the boxes. Boxes need not end at cell borders, as with a window of a larger image;
    they are then extended to whole cells. ValueError for a box outside the grid, or channels that do not divide into
    sin and cos of x and y.
    """
    if channels % 4:
        raise ValueError(f"The model's first layer has {channels} channels; a position map needs a multiple of 4.")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"The interpolation is {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}.")
    table = sinusoids(cells, channels // 2).T[None].to(boxes.device)
    return torch.cat([_part(table, box, size, interpolation) for box in boxes.tolist()])


def _part(table: Tensor, box: list[float], size: tuple[int, int], interpolation: str) -> Tensor:
    """[1, channels, h, w]. Each half varies along one axis only, so each is resized along that axis alone."""
    cells = table.shape[-1]
    y0, x0, y1, x1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    if not (0 <= y0 < y1 <= cells and 0 <= x0 < x1 <= cells):
        raise ValueError(
            f"The box (y {box[0]:g} to {box[2]:g}, x {box[1]:g} to {box[3]:g}) is not a part of the position map's "
            f"{cells} x {cells} cells: give the number of cells that the model was trained with."
        )
    x, y = _line(table[..., x0:x1], size[1], interpolation), _line(table[..., y0:y1], size[0], interpolation)
    return torch.cat([x[:, :, None, :].expand(-1, -1, size[0], -1), y[..., None].expand(-1, -1, -1, size[1])], dim=1)


def _line(part: Tensor, length: int, interpolation: str) -> Tensor:
    if interpolation == "nearest":
        return F.interpolate(part, size=length, mode="nearest")
    return F.interpolate(part, size=length, mode="linear", align_corners=True)


def rotary_positions(
    box: Sequence[float], size: tuple[int, int], patch: int, given: Mapping[str, float]
) -> dict[str, float]:
    """ComfyUI's rope options for a latent of size (h, w), in tokens of patch x patch, that shows the box (y0, x0, y1,
    x1) in cells: token i stands at shift + i scale, such that its centre is where the whole image has it.

    given: options of the whole image, which other nodes may have set.
    """
    options = dict(given)
    for axis, start, end, length in (("y", box[0], box[2], size[0]), ("x", box[1], box[3], size[1])):
        scale, before = (end - start) / length, given.get(f"scale_{axis}", 1.0)
        shift = start / patch + (scale - 1) / 2
        options |= {f"scale_{axis}": before * scale, f"shift_{axis}": given.get(f"shift_{axis}", 0.0) + before * shift}
    return options


def marker(cells: int, interpolation: str) -> dict[str, Tensor]:
    """The tensor in a file that states which position map its weights need."""
    return {MARKER: torch.tensor([float(cells), float(INTERPOLATIONS.index(interpolation))])}


def needed_map(tensors: Mapping[str, Tensor], name: str = "The LoRA") -> tuple[int, str] | None:
    """Cells and interpolation of the position map that weights need; None if they need none.

    ValueError, which names the weights, for a marker of an impossible map.
    """
    if MARKER not in tensors:
        return None
    value = tensors[MARKER]
    cells, index = value.tolist() if value.shape == (2,) else (0, 0)
    if not 1 <= cells <= MAX_CELLS or index not in range(len(INTERPOLATIONS)):
        raise ValueError(f"{name} names an impossible position map: train it again.")
    return int(cells), INTERPOLATIONS[int(index)]
