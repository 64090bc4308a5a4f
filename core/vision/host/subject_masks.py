"""The subject in images, by its name: a detector's boxes, segment-anything's masks, and captions of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ...session import folders
from ...session.inputs import Names
from .. import boxes as geometry
from .extras import caption, grounding, sam
from .extras.grounding import Found
from .sheets import FRAME, INK, PAPER, font, plain

BOX_THRESHOLD, TEXT_THRESHOLD = 0.35, 0.25  # of Grounding DINO's authors
TINT = 0.45  # of the subject on the overlay


@dataclass(frozen=True)
class Request:
    """What to look for. choose: what counts when the detector finds several (core/boxes.py)."""

    subject: str
    box_threshold: float = BOX_THRESHOLD
    text_threshold: float = TEXT_THRESHOLD
    choose: str = geometry.BEST


@dataclass(frozen=True)
class SubjectMasks:
    """mask [B, H, W] of 0 and 1; image [B, H, W, 3]: what was found, drawn on the images; info: in words."""

    mask: Tensor
    image: Tensor
    info: str


def detectors() -> Names:
    """Folders in models/likeness_vision that hold a detector."""
    return _folders(grounding.is_detector)


def captioners() -> Names:
    """Folders in models/likeness_vision that hold a captioning model."""
    return _folders(caption.is_captioner)


def _folders(wanted: Callable[[Path], bool]) -> Names:
    return Names(name for name in folders.names(folders.VISION) if wanted(folders.resolve(folders.VISION, name)))


def subject_masks(image: Tensor, request: Request, detector: Path, segmenter: Path) -> SubjectMasks:
    """Masks of the subject in images [B, H, W, C] in 0..1.

    ValueError when an image does not show it, before segment-anything is built; what is wrong with its package or its
    file is said before anything is looked for.
    """
    if not request.subject.replace(".", "").strip():
        raise ValueError("The subject is empty: write what to look for, in one or two words, such as 'dog'.")
    weights = sam.read_sam(segmenter)
    pictures = [_pixels(each) for each in image]
    detecting = grounding.load_detector(detector)
    detecting.check(request.subject)
    finder = _Loaded(detecting, grounding.input_pixels(detecting) * grounding.BYTES_PER_PIXEL)
    found = []
    for picture in pictures:
        mm.throw_exception_if_processing_interrupted()
        found.append(finder(picture, request.subject, request.box_threshold, request.text_threshold))
    _check_found(found, request)
    segmenting = sam.load_sam(weights)
    cutter = _Loaded(segmenting, sam.INPUT_PIXELS * sam.BYTES_PER_PIXEL)
    masks, drawn = [], []
    lines = [f"'{request.subject.strip()}' by {detecting.description} and {segmenting.description}"]
    for number, (picture, each) in enumerate(zip(pictures, found, strict=True)):
        mm.throw_exception_if_processing_interrupted()
        taken = geometry.chosen(each.boxes, each.scores, request.choose)
        mask = cutter(picture, each.boxes[taken]).any(0)
        if not bool(mask.any()):
            raise ValueError(
                f"In image {number} segment-anything found nothing in the box of the {request.subject.strip()}: draw "
                "the mask by hand (MaskEditor), or choose another sam file."
            )
        masks.append(mask.float())
        drawn.append(_drawn(picture, mask, each, taken))
        lines.append(_line(number, each, taken, float(mask.float().mean()), request.choose))
    return SubjectMasks(torch.stack(masks), torch.stack(drawn), "\n".join(lines))


def captions(image: Tensor, folder: Path, max_tokens: int) -> list[str]:
    """What each of the images [B, H, W, C] shows, in words. ValueError when the model has nothing to say."""
    device = mm.get_torch_device()
    dtype = torch.float16 if mm.should_use_fp16(device, prioritize_performance=False) else torch.float32
    captioner = caption.load_captioner(folder, dtype)
    writer = _Loaded(captioner, caption.BYTES)
    words = []
    for number, each in enumerate(image):
        mm.throw_exception_if_processing_interrupted()
        words.append(writer(_pixels(each), max_tokens))
        if not words[-1]:
            raise ValueError(f"{captioner.description} has no words for image {number}: write the caption yourself.")
    return words


class _Loaded:
    """A network of another library, whole on the device as one of ComfyUI's models, so that others make room for it."""

    def __init__(self, model: nn.Module, memory: float) -> None:
        self.model = model
        self.patcher = comfy.model_patcher.ModelPatcher(
            model, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device()
        )
        mm.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.model(*inputs)


def _pixels(image: Tensor) -> np.ndarray:
    """[H, W, C] in 0..1 -> uint8 [H, W, 3]."""
    return (image[..., :3].float().cpu().clamp(0.0, 1.0) * 255.0).round().byte().numpy()


def _check_found(found: list[Found], request: Request) -> None:
    missing = [(number, each.highest) for number, each in enumerate(found) if not len(each.boxes)]
    if not missing:
        return
    where = ", ".join(f"image {number} (best score {highest:.2f})" for number, highest in missing)
    raise ValueError(
        f"No '{request.subject.strip()}' above the box_threshold of {request.box_threshold:g} was found in {where}, "
        "counted from 0: name it with another word, lower box_threshold below that score, or draw the mask by hand."
    )


def _line(number: int, found: Found, taken: list[int], area: float, choose: str) -> str:
    finds = ", ".join(
        f"{label or 'unnamed'} {score:.2f} at {'/'.join(str(round(edge)) for edge in box)}"
        for label, score, box in zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
    )
    several = ""
    if len(found.boxes) > 1:
        several = f"; {len(found.boxes)} found, taken: number {', '.join(map(str, taken))} ({choose})"
    return f"image {number}: {finds}{several}; mask {100 * area:.1f} % of the image"


def _drawn(picture: np.ndarray, mask: Tensor, found: Found, taken: list[int]) -> Tensor:
    """The image with the mask tinted, and all boxes: those that were taken in the tint's colour."""
    tinted = torch.from_numpy(picture.astype(np.float32))
    tinted[mask] = (1 - TINT) * tinted[mask] + TINT * torch.tensor(FRAME, dtype=torch.float32)
    sheet = Image.fromarray(tinted.round().byte().numpy())
    draw, letters = ImageDraw.Draw(sheet), font()
    for index, (label, score, box) in enumerate(
        zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True)
    ):
        draw.rectangle(box, outline=FRAME if index in taken else INK, width=max(1, max(sheet.size) // 256))
        text = plain(f"{label} {score:.2f}".strip())
        corner = (box[0] + 2, box[1] + 2)
        draw.rectangle(draw.textbbox(corner, text, font=letters), fill=PAPER)
        draw.text(corner, text, fill=INK, font=letters)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255.0)
