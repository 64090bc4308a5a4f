"""A batch of images in a grid, with their scores below each, as one IMAGE."""

from __future__ import annotations

import math
import textwrap

from PIL import Image, ImageDraw
from torch import Tensor

from .sheets import FRAME, INK, MARGIN, PAPER, SMALLEST, as_image, font, plain, thumbnail

MAX_COLUMNS = 6


def score_sheet(images: Tensor, captions: list[list[str]], best: int, footer: list[str]) -> Tensor:
    """[B, H, W, 3] in 0..1 and lines of text per image -> [1, h, w, 3], with a frame around the best and a footer.

    ASCII text only: other characters are replaced by '?', since PIL's default font may lack them.
    """
    face = font()
    thumbnails = [thumbnail(image) for image in images]
    width, height = thumbnails[0].size
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = int(measure.textbbox((0, 0), "Ag", font=face)[3]) + 3
    cell_width = max(width, *(int(measure.textlength(plain(t), font=face)) for c in captions for t in c)) + 2 * MARGIN
    cell_height = height + line * max(len(caption) for caption in captions) + 3 * MARGIN
    columns = min(len(thumbnails), MAX_COLUMNS)
    rows = math.ceil(len(thumbnails) / columns)
    sheet_width = max(columns * cell_width, SMALLEST)
    characters = max(int((sheet_width - 2 * MARGIN) / (measure.textlength("x" * 40, font=face) / 40)), 10)
    notes = [part for text in footer for part in textwrap.wrap(plain(text), characters)]
    sheet_height = rows * cell_height + len(notes) * line + 2 * MARGIN
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(thumbnails, captions, strict=True)):
        x, y = (i % columns) * cell_width + MARGIN, (i // columns) * cell_height + MARGIN
        sheet.paste(image, (x, y))
        if i == best and len(thumbnails) > 1:
            draw.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), outline=FRAME, width=3)
        for k, text in enumerate(caption):
            colour = FRAME if i == best and k == 0 else INK
            draw.text((x, y + height + MARGIN + k * line), plain(text), fill=colour, font=face)
    for k, text in enumerate(notes):
        draw.text((MARGIN, rows * cell_height + MARGIN + k * line), text, fill=INK, font=face)
    return as_image(sheet)
