"""A transformers folder of a zero-shot object detector -> boxes of what a text names. Read from disk only.

Grounding DINO (Liu et al. 2023, arXiv 2303.05499) gives a score for every token of the text, OWL-ViT and OWLv2 one for
the text as a whole; in both cases a box counts as much as its best score.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import boxes as geometry
from .offline import offline
from .transformers_folder import check_complete, kind_of, read_model, read_processor

BY_TOKEN = ("grounding-dino", "mm-grounding-dino")
BY_TEXT = ("owlvit", "owlv2")
DETECTORS = BY_TOKEN + BY_TEXT
SQUARE = "owlv2"  # pads its images to a square, below or to the right: its boxes are fractions of that
BYTES_PER_PIXEL = 3000.0  # of the model's own input, generously, for ComfyUI's memory management


@dataclass(frozen=True)
class Found:
    """What was found in one image, best first. boxes [N, 4] in pixels, scores [N], labels: the words of each.

    highest: the best score of all boxes, kept or not.
    """

    boxes: Tensor
    scores: Tensor
    labels: list[str]
    highest: float


class Detector(nn.Module):
    """A detector with its processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.kind = str(model.config.model_type)
        self.description = f"{name} ({type(model).__name__})"

    def check(self, subject: str) -> None:
        """ValueError for a text that the model cannot take."""
        tokens = len(self.processor.tokenizer(self.wording(subject))["input_ids"])
        config = self.model.config
        limit = getattr(config, "max_text_len", None) or config.text_config.max_position_embeddings
        if tokens > limit:
            raise ValueError(
                f"The subject has {tokens} tokens, {self.description} takes {limit}: name it in one or two words."
            )

    def wording(self, subject: str) -> str:
        """The subject as the model's authors ask for it."""
        words = " ".join(subject.lower().replace(".", " ").split())
        return f"{words}." if self.kind in BY_TOKEN else f"a photo of a {words}"

    def forward(self, image: np.ndarray, subject: str, box_threshold: float, text_threshold: float) -> Found:
        """Boxes in an image, uint8 [H, W, 3], with a score above box_threshold.

        text_threshold: from which score on a word of the text belongs to a box's label.
        """
        from torchvision import ops

        text = self.wording(subject)
        inputs = self.processor(images=image, text=[text], return_tensors="pt").to(_device(self.model))
        with offline():
            output = self.model(**inputs)
        each = output.logits[0].float().sigmoid().cpu()  # [queries, tokens or texts]; tokens beyond the text have 0
        scores = each.amax(1)
        height, width = image.shape[:2]
        longer = max(height, width)
        across, down = (longer, longer) if self.kind == SQUARE else (width, height)
        size = torch.tensor([across, down, across, down])
        boxes = ops.box_convert(output.pred_boxes[0].float().cpu(), "cxcywh", "xyxy") * size
        boxes = ops.clip_boxes_to_image(boxes, (height, width))
        above = torch.nonzero((scores > box_threshold) & (ops.box_area(boxes) >= 1.0)).flatten()
        kept = above[geometry.distinct(boxes[above], scores[above])]
        labels = [self._label(inputs, each[index] > text_threshold, subject) for index in kept.tolist()]
        return Found(boxes[kept], scores[kept], labels, float(scores.max()))

    def _label(self, inputs: Any, reached: Tensor, subject: str) -> str:
        """The words of the subject that a box reached."""
        if self.kind not in BY_TOKEN:
            return subject.strip()
        ids = inputs["input_ids"][0].cpu()
        words = ids[reached[: len(ids)]]
        return self.processor.tokenizer.decode(words, skip_special_tokens=True).replace(".", "").strip()


def is_detector(folder: Path) -> bool:
    return kind_of(folder)[0] in DETECTORS


def load_detector(folder: Path) -> Detector:
    """Load a folder with config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    Raises ValueError with the remedy when it holds something else or is incomplete; RuntimeError when transformers is
    not installed.
    """
    kind, name = kind_of(folder)
    if kind not in DETECTORS:
        raise ValueError(
            f"The folder {folder.name} holds {name or 'no model that can be told'}, expected is a detector that takes "
            f"a text ({', '.join(DETECTORS)}): choose a folder such as grounding-dino-tiny."
        )
    model, missing = read_model(folder, "AutoModelForZeroShotObjectDetection")
    check_complete(folder, missing)
    processor = read_processor(folder)
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"The folder {folder.name} has no tokenizer files: copy the model's whole folder.")
    with offline():
        return Detector(model, processor, folder.name)


def input_pixels(detector: Detector) -> float:
    """About how many pixels the detector looks at."""
    size = getattr(detector.processor.image_processor, "size", None) or {}
    sides = [value for value in dict(size).values() if isinstance(value, int)]
    return float(max(sides, default=800)) ** 2


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
