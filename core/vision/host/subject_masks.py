"""Find a named subject in images with a detector's boxes and segment-anything's masks; and caption images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from .. import boxes as geometry
from .extras import caption, grounding, sam
from .extras.grounding import Detections
from .sheets import FRAME, INK, PAPER, as_image, as_pixels, font, plain

BOX_THRESHOLD, TEXT_THRESHOLD = 0.35, 0.25  # Grounding DINO's reference values
TINT = 0.45  # opacity of the tint on the subject


def subject_masks(
    image: Tensor,
    detector: Path,
    segmenter: Path,
    subject: str,
    box_threshold: float = BOX_THRESHOLD,
    text_threshold: float = TEXT_THRESHOLD,
    choose: str = geometry.BEST,
) -> tuple[Tensor, Tensor, str]:
    """Masks [B, H, W] of 0 and 1 of the subject in images [B, H, W, C] in 0..1, the images with the detections drawn on
    them, and a report. ValueError when an image does not show it; faults of segment-anything come before the detection.

    choose: which boxes to use when the detector finds several (core/vision/boxes.py).
    """
    if not subject.replace(".", "").strip():
        raise ValueError("The subject is empty: write what to look for, in one or two words, such as 'dog'.")
    segmenter_model = sam.load_sam(segmenter)
    images = list(map(as_pixels, image))
    detector_model = grounding.load_detector(detector)
    detector_model.check(subject)
    detect = _loaded(detector_model, grounding.input_pixels(detector_model) * grounding.BYTES_PER_PIXEL)
    detections = []
    for pixels in images:
        mm.throw_exception_if_processing_interrupted()
        detections.append(detect(pixels, subject, box_threshold, text_threshold))
    subject = subject.strip()
    missing = [(number, each.highest) for number, each in enumerate(detections) if not len(each.boxes)]
    if missing:
        where = ", ".join(f"image {number} (best score {highest:.2f})" for number, highest in missing)
        raise ValueError(
            f"No '{subject}' above the box_threshold of {box_threshold:g} was found in {where}, "
            "counted from 0: name it with another word, lower box_threshold below that score, or draw the mask by hand."
        )
    segment = _loaded(segmenter_model, sam.INPUT_PIXELS * sam.BYTES_PER_PIXEL)
    masks, overlays = [], []
    lines = [f"'{subject}' by {detector_model.description} and {segmenter_model.description}"]
    for number, (pixels, each) in enumerate(zip(images, detections, strict=True)):
        mm.throw_exception_if_processing_interrupted()
        selected = geometry.select_boxes(each.boxes, each.scores, choose)
        mask = segment(pixels, each.boxes[selected]).any(0)
        if not bool(mask.any()):
            raise ValueError(
                f"In image {number} segment-anything found nothing in the box of the {subject}: draw "
                "the mask by hand (MaskEditor), or choose another sam file."
            )
        masks.append(mask.float())
        overlays.append(_overlay(pixels, mask, each, selected))
        boxes = ", ".join(
            f"{label or 'unnamed'} {score:.2f} at {'/'.join(str(round(edge)) for edge in box)}"
            for label, score, box in each.each()
        )
        if len(each.boxes) > 1:
            boxes += f"; {len(each.boxes)} found, taken: number {', '.join(map(str, selected))} ({choose})"
        lines.append(f"image {number}: {boxes}; mask {100 * float(mask.float().mean()):.1f} % of the image")
    return torch.stack(masks), torch.stack(overlays), "\n".join(lines)


def captions(image: Tensor, folder: Path, max_tokens: int) -> list[str]:
    """A caption for each of the images [B, H, W, C]. ValueError when the model returns an empty one."""
    device = mm.get_torch_device()
    dtype = torch.float16 if mm.should_use_fp16(device, prioritize_performance=False) else torch.float32
    captioner = caption.load_captioner(folder, dtype)
    write = _loaded(captioner, caption.BYTES)
    texts = []
    for number, each in enumerate(image):
        mm.throw_exception_if_processing_interrupted()
        texts.append(write(as_pixels(each), max_tokens))
        if not texts[-1]:
            raise ValueError(f"{captioner.description} has no words for image {number}: write the caption yourself.")
    return texts


def _loaded(model: nn.Module, memory: float) -> Callable[..., Any]:
    """Another library's network, fully loaded through ComfyUI, which makes room for it like for its own models."""
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device()
    )
    mm.load_models_gpu([patcher], memory_required=memory, force_full_load=True)

    def run(*inputs: Any) -> Any:
        with torch.no_grad():
            return patcher.model(*inputs)  # the patcher lives as long as this function

    return run


def _overlay(pixels: np.ndarray, mask: Tensor, detections: Detections, selected: list[int]) -> Tensor:
    """The image with the mask tinted and all boxes drawn, the selected ones in the colour of the tint."""
    tinted = torch.from_numpy(pixels.astype(np.float32))
    tinted[mask] = (1 - TINT) * tinted[mask] + TINT * torch.tensor(FRAME, dtype=torch.float32)
    sheet = Image.fromarray(tinted.round().byte().numpy())
    draw, face = ImageDraw.Draw(sheet), font()
    for index, (label, score, box) in enumerate(detections.each()):
        draw.rectangle(box, outline=FRAME if index in selected else INK, width=max(1, max(sheet.size) // 256))
        text = plain(f"{label} {score:.2f}".strip())
        corner = (box[0] + 2, box[1] + 2)
        draw.rectangle(draw.textbbox(corner, text, font=face), fill=PAPER)
        draw.text(corner, text, fill=INK, font=face)
    return as_image(sheet)[0]
