"""HiFi Tuner (arXiv 2312.00079), section 3.3: choose a reference image of the subject and align it with another."""

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
MAX_DEGREES = 60.0  # an upside-down subject may overlap slightly better, but is the wrong reference
ONLY_REFERENCE, ONLY_TARGET, BOTH = (0.94, 0.27, 0.27), (0.23, 0.51, 0.96), (0.13, 0.77, 0.37)
TINT = 0.5
DRAW = "connect a mask of the subject (Subject Mask, or draw one)"


def choose_reference(images: Tensor, target: Tensor, vision: Any, masks: Tensor | None) -> tuple[int, float, str]:
    """The index of the candidate [B, H, W, C] most similar to the generated image [1, h, w, C], the cosine of their
    whole-image embeddings (the paper uses the class token of DINO ViT-S/16), and all similarities as text.
    """
    if len(target) != 1:
        raise ValueError(
            f"{len(target)} generated images were given, one is expected: take one of them (ImageFromBatch)."
        )
    if masks is not None and len(masks) != len(images):
        raise ValueError(
            f"{len(masks)} masks came with {len(images)} candidates: give one for each, in the same order, or none."
        )
    mm.throw_exception_if_processing_interrupted()
    embeddings, target_embedding = embed(vision, images), embed(vision, target)
    similarities = F.cosine_similarity(embeddings, target_embedding).tolist()
    best = max(range(len(similarities)), key=similarities.__getitem__)
    lines = [
        f"image {number}: {value:.4f}" + (" (taken)" if number == best else "")
        for number, value in enumerate(similarities)
    ]
    return best, similarities[best], "\n".join([*lines, f"by {describe(vision)}"])


def align_reference(
    image: Tensor, mask: Tensor, target: Tensor, form: str, max_degrees: float
) -> tuple[Tensor, Tensor, float, Tensor, str]:
    """Transform the reference image [1, H, W, C] and its mask so that its subject covers the target's mask: both in the
    target's frame, their IoU, an image of both subjects in colour, and the transform as text.
    """
    for name, tensor in (("picture", image), ("mask", mask), ("target_mask", target)):
        if tensor.ndim > 2 and len(tensor) != 1:
            raise ValueError(
                f"{len(tensor)} were given as {name}, one is expected: take one of them (Choose Reference, "
                "ImageFromBatch)."
            )
    size = (image.shape[1], image.shape[2])
    with torch.inference_mode(False), torch.enable_grad():  # nodes run in inference mode; the fit needs gradients
        reference_mask, target_mask = _plane("mask", mask.clone(), size), _plane("target_mask", target.clone(), None)
        fit = alignment.align(reference_mask, target_mask, form == LITERAL, max_degrees)
    frame = (target_mask.shape[0], target_mask.shape[1])
    pixels = image[..., :3].float().cpu().movedim(-1, 1)
    warped = alignment.warp(pixels, fit.matrix, frame).movedim(1, -1).clamp(0.0, 1.0)
    warped_mask = (alignment.warp(reference_mask[None, None], fit.matrix, frame, "zeros")[:, 0] > 0.5).float()
    if not bool(warped_mask.any()):
        raise ValueError(
            "The transform left nothing of the subject in the frame: use the form 'symmetric', and check both masks."
        )
    rows = "\n".join("  ".join(f"{value:8.4f}" for value in row) for row in fit.matrix.tolist())
    description = (
        f"scale {fit.scale:.3f}, turned by {fit.degrees:.1f} degrees, IoU {fit.iou:.3f} ({form})\n{rows}\n"
        "from (x, y, 1) of the reference to the target; both reach from -1 to 1 along the longer side"
    )
    return warped, warped_mask, fit.iou, _overlay(warped, warped_mask, target_mask), description


def _plane(name: str, mask: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A mask as [H, W] of 0 and 1, at its image's size. ValueError if it is empty, full, or of another aspect ratio."""
    shape = (mask.shape[-2], mask.shape[-1])
    of_reference = size is not None  # it may be a cut-out of Load Image, which a generated image never is
    plane = checked_mask(mask, 1, size or shape, name=name, empty=DRAW, full=DRAW, subject=of_reference)[None]
    if size is not None and shape != size:
        plane = F.interpolate(plane, size, mode="bilinear", align_corners=False)
        checked_mask(plane, 1, size, name=name, empty=DRAW, full=DRAW)
    return (plane[0, 0] > 0.5).float()


def _overlay(image: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """The transformed image, red where only the reference's subject is, blue only the target's, green both."""
    one, other = reference[0] > 0.5, target > 0.5
    overlay = image.clone()
    for where, colour in ((one & ~other, ONLY_REFERENCE), (other & ~one, ONLY_TARGET), (one & other, BOTH)):
        overlay[0][where] = (1 - TINT) * overlay[0][where] + TINT * torch.tensor(colour)
    return overlay
