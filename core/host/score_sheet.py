"""A batch of pictures in a grid, each with its scores written under it, as one IMAGE."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 192, 512  # px, longer side of a picture on the sheet
MARGIN, FONT_SIZE = 8, 14
MAX_COLUMNS = 6
PAPER, INK, FRAME = (24, 24, 27), (228, 228, 231), (34, 197, 94)


def score_sheet(images: Tensor, captions: list[list[str]], best: int, footer: list[str]) -> Tensor:
    """[B, H, W, 3] in 0..1 and lines of text per picture -> [1, h, w, 3]. The best has a frame; the footer is below.

    ASCII text only: other characters are shown as '?', since PIL's own font may lack them.
    """
    font = _font()
    pictures = [_thumbnail(image) for image in images]
    width, height = pictures[0].size
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = int(measure.textbbox((0, 0), "Ag", font=font)[3]) + 3
    cell_width = max(width, *(int(measure.textlength(_plain(t), font=font)) for c in captions for t in c)) + 2 * MARGIN
    cell_height = height + line * max(len(caption) for caption in captions) + 3 * MARGIN
    columns = min(len(pictures), MAX_COLUMNS)
    rows = math.ceil(len(pictures) / columns)
    sheet_width = max(columns * cell_width, SMALLEST)
    characters = max(int((sheet_width - 2 * MARGIN) / (measure.textlength("x" * 40, font=font) / 40)), 10)
    notes = [part for text in footer for part in textwrap.wrap(_plain(text), characters)]
    sheet_height = rows * cell_height + len(notes) * line + 2 * MARGIN
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = (i % columns) * cell_width + MARGIN, (i // columns) * cell_height + MARGIN
        sheet.paste(picture, (x, y))
        if i == best and len(pictures) > 1:
            draw.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), outline=FRAME, width=3)
        for k, text in enumerate(caption):
            draw.text(
                (x, y + height + MARGIN + k * line),
                _plain(text),
                fill=FRAME if i == best and k == 0 else INK,
                font=font,
            )
    for k, text in enumerate(notes):
        draw.text((MARGIN, rows * cell_height + MARGIN + k * line), text, fill=INK, font=font)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255.0)[None]


def _thumbnail(image: Tensor) -> Image.Image:
    pixels = (image[..., :3].float().cpu().clamp(0.0, 1.0) * 255.0).round().byte().numpy()
    picture = Image.fromarray(pixels)
    longer = max(picture.size)
    scale = min(max(longer, SMALLEST), LARGEST) / longer
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(FONT_SIZE)
    except (TypeError, OSError, ImportError):  # Pillow before 10.1, or built without FreeType: one small bitmap font
        return ImageFont.load_default()


def _plain(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")
