"""Attention maps as one image: a row for each token and one for their mean, a column for each noise level."""

import torch
from torch import Tensor

from ...vision.host.sheets import MARGIN, labelled_grid, thumbnail
from ..maps import normalize_maps
from .maps import Maps

TILE, SHEET = 192, 4096  # px: maximum longer side of a map; approximate longer side of the whole sheet
TITLE = "attention to the last {} tokens of the prompt, from noise (0) to image (1)"
SHADES = ((24, 24, 27), (67, 30, 120), (190, 55, 90), (250, 150, 40), (255, 250, 190))  # from dark to light


def map_sheet(maps: Maps) -> Tensor:
    """[1, H, W, 3] in 0..1. Each row is scaled to 0..1 separately; its maximum is printed next to it."""
    count = maps.values.shape[1]
    rows = [*maps.values.unbind(1), maps.values.mean(1)]
    names = [*(f"token {index - count}" for index in range(count)), "mean"]
    labels = [(name, f"to {float(row.amax()):.3f}") for name, row in zip(names, rows, strict=True)]
    side = tile_side(len(rows), len(maps.percents), *maps.values.shape[-2:])
    tiles = [[thumbnail(apply_colormap(tile), side) for tile in normalize_maps(row)] for row in rows]
    return labelled_grid(tiles, labels, [f"{percent:.2f}" for percent in maps.percents], TITLE.format(count))


def tile_side(rows: int, columns: int, height: int, width: int) -> int:
    """The longer side of a map [height, width] so that rows x columns of them fit on a sheet, at most TILE."""
    longer = max(height, width)
    sizes = ((SHEET / count - MARGIN) * longer / side for count, side in ((rows, height), (columns, width)))
    return max(1, int(min(TILE, *sizes)))


def apply_colormap(values: Tensor) -> Tensor:
    """[h, w] in 0..1 -> [h, w, 3], from dark to light."""
    shades = torch.tensor(SHADES, dtype=torch.float32) / 255.0
    position = values.float().clamp(0.0, 1.0) * (len(SHADES) - 1)
    lower = position.floor().clamp(max=len(SHADES) - 2).long()
    fraction = (position - lower).unsqueeze(-1)
    return shades[lower] * (1 - fraction) + shades[lower + 1] * fraction
