"""Masks of annotation files, and parts of images on squares."""

from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Mask = NDArray[numpy.uint8]
"""[H, W], 1 inside."""


def read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """A segmentation of an annotation file, in any of COCO's forms, as compressed run lengths; None if damaged."""
    from pycocotools import mask as coco

    try:
        if isinstance(segmentation, list) and min(map(len, segmentation)) < 6:
            return None  # a polygon of fewer than three points, which pycocotools takes for a box
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
            return {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
        runs = coco.frPyObjects(segmentation, height, width)
        return coco.merge(runs) if isinstance(runs, list) else runs
    except Exception:  # pycocotools raises many types
        return None


def unpack(runs: dict[str, Any], image: Image.Image) -> Mask:
    """The mask of an image. ValueError for one that is empty or of another size, or whose run lengths are damaged."""
    from pycocotools import mask as coco

    mask = coco.decode(runs)
    # What too few run lengths leave open is not set by decode().
    if mask.shape[::-1] != image.size or coco.encode(mask)["counts"] != runs["counts"] or not mask.any():
        raise ValueError(f"an empty or damaged mask, or one of another image: {mask.shape[1]} x {mask.shape[0]} pixels")
    return mask


def cut_out(image: Image.Image, mask: Mask) -> Image.Image:
    """The image inside the mask, on white, cropped to the mask's box."""
    inside = Image.fromarray(mask * 255)
    return Image.composite(image, Image.new("RGB", image.size, "white"), inside).crop(inside.getbbox())


def largest_part(mask: Mask) -> float:
    """The largest connected part's share of a mask's pixels."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask, structure=numpy.ones((3, 3)))
    sizes = numpy.bincount(parts.ravel())[1:]
    return float(sizes.max() / sizes.sum())


def place(image: Image.Image, width: float, height: float, size: int, ground: str = "white") -> Tensor:
    """[3, size, size] in 0..1: an image stretched to width and height, centred on a square."""
    square = Image.new("RGB", (size, size), ground)
    part = image.resize((max(1, round(width)), max(1, round(height))), Image.Resampling.BILINEAR)
    square.paste(part, ((size - part.width) // 2, (size - part.height) // 2))
    return torch.from_numpy(numpy.array(square)).movedim(-1, 0).float() / 255
