"""Read masks in the formats of datasets, and cut out parts of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Mask = NDArray[numpy.bool_]
Pixels = NDArray[numpy.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are exclusive

SHIFT = 48  # characters of a compressed count start at "0", with five bits each
MORE, SIGN = 0x20, 0x10
FINER = 4  # supersampling factor for polygons


def pixels(path: Path) -> Pixels:
    """An RGB image [H, W, 3]."""
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"))


def polygons(rows: Sequence[Any], height: int, width: int) -> Mask:
    """The mask [H, W] of an outline of one or several polygons, each x, y, x, y, ... in pixels.

    A pixel belongs to the mask if more than half of it lies inside; COCO's tools may differ at the outline.
    """
    canvas = Image.new("L", (width * FINER, height * FINER))
    draw = ImageDraw.Draw(canvas)
    for row in rows:
        points = numpy.asarray(row, dtype=float).reshape(-1, 2)
        if len(points) < 3:
            raise ValueError("a polygon of fewer than three points")
        draw.polygon([(float(x), float(y)) for x, y in points * FINER - 0.5], fill=255)
    return numpy.asarray(canvas.reduce(FINER)) > 127


def compressed_counts(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: little-endian groups of five bits; from the third count on, differences to
    the count two before.
    """
    counts: list[int] = []
    value, bits = 0, 0
    for character in text:
        code = ord(character) - SHIFT
        value |= (code & 0x1F) << bits
        bits += 5
        if not code & MORE:
            if code & SIGN:
                value -= 1 << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, bits = 0, 0
    return counts


def run_lengths(counts: Sequence[int] | NDArray[Any], height: int, width: int) -> Mask:
    """The mask [H, W] of run lengths along the columns; the first run is outside."""
    runs = numpy.asarray(counts, dtype=numpy.int64)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"run lengths of {int(runs.sum())} pixels for {width} x {height}")
    inside = numpy.arange(len(runs)) % 2 == 1
    return numpy.repeat(inside, runs).reshape(width, height).T


def pack(segmentation: Any) -> Any:
    """A segmentation of an annotation file in less memory: run lengths as an array, polygons as a list of arrays."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return numpy.asarray(compressed_counts(counts) if isinstance(counts, str) else counts, dtype=numpy.int32)
    return [numpy.asarray(row, dtype=numpy.float32) for row in segmentation]


def pack_if_valid(segmentation: Any) -> Any | None:
    """pack(), or None for a damaged segmentation: one in half a million is no reason to stop."""
    try:
        return pack(segmentation)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError):
        return None


def unpack(segmentation: Any, height: int, width: int) -> Mask:
    """The mask [H, W] of a pack() result. ValueError for a mask of another size, or an empty one."""
    if isinstance(segmentation, list):
        mask = polygons(segmentation, height, width)
    else:
        mask = run_lengths(segmentation, height, width)
    if not mask.any():
        raise ValueError("an empty mask")
    return mask


def bounds(mask: Mask) -> Box:
    """The smallest box around a mask."""
    rows, columns = numpy.flatnonzero(mask.any(1)), numpy.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def largest_part(mask: Mask) -> float:
    """The largest connected part's share of a mask's pixels."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask, structure=numpy.ones((3, 3)))
    sizes = numpy.bincount(parts.ravel())[1:]
    return float(sizes.max() / sizes.sum())


def on_white(image: Pixels, mask: Mask) -> Pixels:
    """The image inside the mask, white elsewhere."""
    return numpy.where(mask[..., None], image, numpy.uint8(255))


def place(image: Pixels, inner: tuple[float, float], size: int, colour: int = 255) -> Tensor:
    """[3, size, size] in 0..1: an image stretched to inner (width, height), centred on a square of one colour."""
    width, height = (min(size, max(1, round(length))) for length in inner)
    square = Image.new("RGB", (size, size), (colour,) * 3)
    part = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    square.paste(part, ((size - width) // 2, (size - height) // 2))
    return torch.from_numpy(numpy.array(square)).movedim(-1, 0).float() / 255
