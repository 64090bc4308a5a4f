"""Drawing sheets of images: colours, font, thumbnails, a labelled grid, images with their scores; as one IMAGE."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST, LARGEST = 192, 512  # px, range of the longer side of an image on a sheet
MARGIN, FONT_SIZE, MAX_COLUMNS = 8, 14, 6
PAPER, INK, FRAME = (24, 24, 27), (228, 228, 231), (34, 197, 94)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def as_pixels(image: Tensor) -> np.ndarray:
    """[H, W, C] in 0..1 -> uint8 [H, W, 3]."""
    return (image[..., :3].float().cpu().clamp(0.0, 1.0) * 255.0).round().byte().numpy()


def thumbnail(image: Tensor, largest: int = LARGEST) -> Image.Image:
    """[H, W, C] in 0..1 -> a PIL image whose longer side is between SMALLEST and `largest`."""
    result = Image.fromarray(as_pixels(image))
    longer = max(result.size)
    scale = min(max(longer, SMALLEST), largest) / longer
    size = (max(round(result.width * scale), 1), max(round(result.height * scale), 1))
    return result if size == result.size else result.resize(size, Image.Resampling.LANCZOS)


def font(size: int = FONT_SIZE) -> Font:
    """PIL's default font, at this size if Pillow supports it."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):  # Pillow before 10.1, or built without FreeType: one small bitmap font
        return ImageFont.load_default()


def plain(text: str) -> str:
    """The text in ASCII, with '?' for other characters, which PIL's default font may lack."""
    return text.encode("ascii", "replace").decode("ascii")


def as_image(sheet: Image.Image) -> Tensor:
    """A PIL image -> [1, h, w, 3] in 0..1."""
    return torch.from_numpy(np.asarray(sheet.convert("RGB")).astype(np.float32) / 255.0)[None]


def labelled_grid(
    tiles: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[Sequence[str]],
    columns: Sequence[str],
    title: str = "",
    size: int = FONT_SIZE,
) -> Tensor:
    """[1, h, w, 3] in 0..1: tiles in rows and columns, with a line of text above each column, lines of text beside each
    row, and a title on top.

    size: of the text, in pixels.
    """
    face, line = font(size), FONT_SIZE + 6

    def text_width(texts: Sequence[str]) -> int:
        return max(int(face.getlength(text)) for text in texts)

    present = [tile for row in tiles for tile in row if tile is not None]
    width = max(text_width(columns), *(tile.width for tile in present)) + MARGIN
    height = max(max(tile.height for tile in present) + MARGIN, 2 * line)
    left, above = text_width([text for row in rows for text in row]) + 3 * MARGIN, line * bool(title)
    top = above + line + 2 * MARGIN
    sheet_width = max(left + len(columns) * width + MARGIN, text_width([title]) + 2 * MARGIN)
    sheet = Image.new("RGB", (sheet_width, top + len(rows) * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=face)
    for column, text in enumerate(columns):
        centre(draw, left + column * width + (width - MARGIN) / 2, MARGIN + above, text, face)
    for index, (row, texts) in enumerate(zip(tiles, rows, strict=True)):
        y = top + index * height
        for k, text in enumerate(texts):
            draw.text((MARGIN, y + (height - MARGIN) / 2 + (k - 1) * line), text, fill=INK, font=face)
        for column, tile in enumerate(row):
            if tile is not None:
                sheet.paste(tile, (left + column * width, y))
    return as_image(sheet)


def centre(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, face: Font) -> None:
    """Draw text horizontally centred at x."""
    draw.text((x - draw.textlength(text, font=face) / 2, y), text, fill=INK, font=face)


def score_sheet(images: Tensor, captions: list[list[str]], best: int, footer: list[str]) -> Tensor:
    """[B, H, W, 3] in 0..1 and lines of text per image -> [1, h, w, 3], with a frame around the best and a footer."""
    face = font()
    thumbnails = [thumbnail(image) for image in images]
    width, height = thumbnails[0].size
    line = int(face.getbbox("Ag")[3]) + 3
    cell_width = max(width, *(int(face.getlength(plain(t))) for c in captions for t in c)) + 2 * MARGIN
    cell_height = height + line * max(len(caption) for caption in captions) + 3 * MARGIN
    columns = min(len(thumbnails), MAX_COLUMNS)
    rows = math.ceil(len(thumbnails) / columns)
    sheet_width = max(columns * cell_width, SMALLEST)
    characters = max(int((sheet_width - 2 * MARGIN) / (face.getlength("x" * 40) / 40)), 10)
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
