"""Attention maps as one picture: a line for each row of the prompt and one for their mean, a column for each level."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...vision.host.sheets import FONT_SIZE, INK, MARGIN, PAPER, as_image, centre, font, thumbnail
from ..maps import stretched
from .maps import Maps

TILE, SHEET = 192, 4096  # px, the longer side of a map at most, and of all maps together about
TITLE = "attention to the last {} rows of the prompt, from noise (0) to picture (1)"
SHADES = ((24, 24, 27), (67, 30, 120), (190, 55, 90), (250, 150, 40), (255, 250, 190))  # from dark to light


def map_sheet(maps: Maps) -> Tensor:
    """[1, H, W, 3] in 0..1. Every row is stretched to 0..1 by itself; its highest attention is written beside it."""
    count = maps.values.shape[1]
    rows = [*maps.values.unbind(1), maps.values.mean(1)]
    names = [*(f"row {index - count}" for index in range(count)), "mean"]
    labels = [(name, f"to {float(row.amax()):.3f}") for name, row in zip(names, rows, strict=True)]
    side = tile_side(len(rows), len(maps.percents), *maps.values.shape[-2:])
    tiles = [[thumbnail(coloured(tile), side) for tile in stretched(row)] for row in rows]
    face, line = font(), FONT_SIZE + 6
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(measure.textlength(text, font=face)) for label in labels for text in label) + 3 * MARGIN
    title = TITLE.format(count)
    width, height = (size + MARGIN for size in tiles[0][0].size)
    width = max(width, int(measure.textlength("0.00", font=face)) + MARGIN)  # labels of small maps do not meet
    height = max(height, 2 * line)
    top = 2 * line + 2 * MARGIN
    whole = max(left + len(tiles[0]) * width + MARGIN, int(measure.textlength(title, font=face)) + 2 * MARGIN)
    sheet = Image.new("RGB", (whole, top + len(tiles) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=face)
    for column, percent in enumerate(maps.percents):
        centre(draw, left + column * width + (width - MARGIN) / 2, MARGIN + line, f"{percent:.2f}", face)
    for index, (row, label) in enumerate(zip(tiles, labels, strict=True)):
        y = top + index * height
        for k, text in enumerate(label):
            draw.text((MARGIN, y + height / 2 + (k - 1) * line), text, fill=INK, font=face)
        for column, tile in enumerate(row):
            sheet.paste(tile, (left + column * width, y))
    return as_image(sheet)


def tile_side(rows: int, columns: int, height: int, width: int) -> int:
    """The longer side of a map [height, width] with which so many fit on a sheet, TILE at most."""
    longer = max(height, width)
    fitting = ((SHEET / count - MARGIN) * longer / side for count, side in ((rows, height), (columns, width)))
    return max(1, int(min(TILE, *fitting)))


def coloured(values: Tensor) -> Tensor:
    """[h, w] in 0..1 -> [h, w, 3], from dark to light."""
    shades = torch.tensor(SHADES, dtype=torch.float32) / 255.0
    place = values.float().clamp(0.0, 1.0) * (len(SHADES) - 1)
    lower = place.floor().clamp(max=len(SHADES) - 2).long()
    part = (place - lower).unsqueeze(-1)
    return shades[lower] * (1 - part) + shades[lower + 1] * part
