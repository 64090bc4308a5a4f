"""HiFi Tuner (arXiv 2312.00079), section 3.3: the subject's image that serves as reference, and laid on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ...session.images import checked_mask
from ...vision.host.vision import describe, embed
from .. import alignment

SYMMETRIC, LITERAL = "symmetric", "as printed"
FORMS = (SYMMETRIC, LITERAL)
MAX_DEGREES = 60.0  # a subject upside down may cover the other a little better, and is the wrong reference
ONLY_REFERENCE, ONLY_TARGET, BOTH = (0.94, 0.27, 0.27), (0.23, 0.51, 0.96), (0.13, 0.77, 0.37)
TINT = 0.5
DRAW = "connect a mask of the subject (Subject Mask, or draw one)"


@dataclass(frozen=True)
class Choice:
    """index: of the best candidate. similarity: its cosine with the generated image. info: all of them."""

    index: int
    similarity: float
    info: str


@dataclass(frozen=True)
class Laid:
    """The reference, transformed. image [1, H, W, 3] and mask [1, H, W] (0 and 1) in the target's frame; overlay: where
    the two subjects are; matrix: the transform in words.
    """

    image: Tensor
    mask: Tensor
    iou: float
    overlay: Tensor
    matrix: str


def choose_reference(images: Tensor, picture: Tensor, vision: Any, masks: Tensor | None) -> Choice:
    """The candidate [B, H, W, C] that is most like the generated image [1, h, w, C]: cosine of whole images'
    embeddings (the paper: the class token of DINO ViT-S/16).
    """
    if len(picture) != 1:
        raise ValueError(
            f"{len(picture)} generated images were given, one is expected: take one of them (ImageFromBatch)."
        )
    if masks is not None and len(masks) != len(images):
        raise ValueError(
            f"{len(masks)} masks came with {len(images)} candidates: give one for each, in the same order, or none."
        )
    mm.throw_exception_if_processing_interrupted()
    candidates, wanted = embed(vision, images), embed(vision, picture)
    similarities = F.cosine_similarity(candidates, wanted).tolist()
    best = max(range(len(similarities)), key=similarities.__getitem__)
    lines = [
        f"image {number}: {value:.4f}" + (" (taken)" if number == best else "")
        for number, value in enumerate(similarities)
    ]
    return Choice(best, similarities[best], "\n".join([*lines, f"by {describe(vision)}"]))


def lay_on(image: Tensor, mask: Tensor, target: Tensor, form: str, max_degrees: float) -> Laid:
    """The reference image [1, H, W, C] with its mask, transformed so that its subject covers the target's mask."""
    for name, tensor in (("picture", image), ("mask", mask), ("target_mask", target)):
        if tensor.ndim > 2 and len(tensor) != 1:
            raise ValueError(
                f"{len(tensor)} were given as {name}, one is expected: take one of them (Choose Reference, "
                "ImageFromBatch)."
            )
    size = (image.shape[1], image.shape[2])
    with torch.inference_mode(False), torch.enable_grad():  # nodes are run under inference mode; this is a fit
        ours, theirs = _plane("mask", mask.clone(), size), _plane("target_mask", target.clone(), None)
        found = alignment.align(ours, theirs, form == LITERAL, max_degrees)
    frame = (theirs.shape[0], theirs.shape[1])
    pixels = image[..., :3].float().cpu().movedim(-1, 1)
    picture = alignment.warp(pixels, found.matrix, frame).movedim(1, -1).clamp(0.0, 1.0)
    covered = (alignment.warp(ours[None, None], found.matrix, frame, "zeros")[:, 0] > 0.5).float()
    if not bool(covered.any()):
        raise ValueError(
            "The transform left nothing of the subject in the frame: use the form 'symmetric', and check both masks."
        )
    rows = "\n".join("  ".join(f"{value:8.4f}" for value in row) for row in found.matrix.tolist())
    words = (
        f"scale {found.scale:.3f}, turned by {found.degrees:.1f} degrees, IoU {found.iou:.3f} ({form})\n{rows}\n"
        "from (x, y, 1) of the reference to the target; both reach from -1 to 1 along the longer side"
    )
    return Laid(picture, covered, found.iou, _overlay(picture, covered, theirs), words)


def _plane(name: str, mask: Tensor, size: tuple[int, int] | None) -> Tensor:
    """One mask as [H, W] of 0 and 1, at its image's size. ValueError when it is empty, full, or of another
    proportion."""
    own = (mask.shape[-2], mask.shape[-1])
    plane = checked_mask(mask, 1, size or own, name=name, empty=DRAW, full=DRAW)[None]
    if size is not None and own != size:
        plane = F.interpolate(plane, size, mode="bilinear", align_corners=False)
        checked_mask(plane, 1, size, name=name, empty=DRAW, full=DRAW)
    return (plane[0, 0] > 0.5).float()


def _overlay(picture: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """The transformed image; red where only the reference's subject is, blue only the target's, green both."""
    one, other = ours[0] > 0.5, theirs > 0.5
    shown = picture.clone()
    for where, colour in ((one & ~other, ONLY_REFERENCE), (other & ~one, ONLY_TARGET), (one & other, BOTH)):
        shown[0][where] = (1 - TINT) * shown[0][where] + TINT * torch.tensor(colour)
    return shown
