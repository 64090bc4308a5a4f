"""A transformers folder of a zero-shot object detector -> boxes of the object named by a text. Read from disk only.

Grounding DINO (Liu et al. 2023, arXiv 2303.05499) gives one score per token of the text, OWL-ViT and OWLv2 one for the
whole text; in both cases a box's score is its highest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import boxes as geometry
from .offline import offline, running
from .transformers_folder import kind_of, read_model, read_processor

BY_TOKEN = ("grounding-dino", "mm-grounding-dino")
BY_TEXT = ("owlvit", "owlv2")
DETECTORS = BY_TOKEN + BY_TEXT
SQUARE = "owlv2"  # pads images to a square, at the bottom or the right: its boxes are fractions of the square
BYTES_PER_PIXEL = 3000.0  # of the model's input, an upper estimate, for ComfyUI's memory management


@dataclass(frozen=True)
class Detections:
    """The detections in one image, best first. boxes [N, 4] in pixels, scores [N], labels: the matched words of each.

    highest: the best score among all boxes, including those below the threshold.
    """

    boxes: Tensor
    scores: Tensor
    labels: list[str]
    highest: float

    def each(self) -> list[tuple[str, float, list[float]]]:
        """The label, score and box of each."""
        return list(zip(self.labels, self.scores.tolist(), self.boxes.tolist(), strict=True))


class Detector(nn.Module):
    """A detector with its processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.kind = str(model.config.model_type)
        self.description = f"{name} ({type(model).__name__})"

    def check(self, subject: str) -> None:
        """ValueError for a text that is too long for the model."""
        tokens = len(self.processor.tokenizer(self.query(subject))["input_ids"])
        config = self.model.config
        limit = getattr(config, "max_text_len", None) or config.text_config.max_position_embeddings
        if tokens > limit:
            raise ValueError(
                f"The subject has {tokens} tokens, {self.description} takes {limit}: name it in one or two words."
            )

    def query(self, subject: str) -> str:
        """The subject in the prompt format of the model."""
        words = " ".join(subject.lower().replace(".", " ").split())
        return f"{words}." if self.kind in BY_TOKEN else f"a photo of a {words}"

    def forward(self, image: np.ndarray, subject: str, box_threshold: float, text_threshold: float) -> Detections:
        """Boxes in an image, uint8 [H, W, 3], with a score above box_threshold.

        text_threshold: minimum score of a word of the text to be part of a box's label.
        """
        from torchvision import ops

        text = self.query(subject)
        with offline(), running(self.description):
            inputs = self.processor(images=image, text=[text], return_tensors="pt")
            output = self.model(**inputs.to(next(self.model.parameters()).device))
        probabilities = output.logits[0].float().sigmoid().cpu()  # [queries, tokens or texts]; 0 beyond the text
        scores = probabilities.amax(1)
        height, width = image.shape[:2]
        longer = max(height, width)
        scale_x, scale_y = (longer, longer) if self.kind == SQUARE else (width, height)
        size = torch.tensor([scale_x, scale_y, scale_x, scale_y])
        boxes = ops.box_convert(output.pred_boxes[0].float().cpu(), "cxcywh", "xyxy") * size
        boxes = ops.clip_boxes_to_image(boxes, (height, width))
        above = torch.nonzero((scores > box_threshold) & (ops.box_area(boxes) >= 1.0)).flatten()
        indices = above[geometry.suppress_overlaps(boxes[above], scores[above])]
        labels = [self._label(inputs, probabilities[index] > text_threshold, subject) for index in indices.tolist()]
        return Detections(boxes[indices], scores[indices], labels, float(scores.max()))

    def _label(self, inputs: Any, matches: Tensor, subject: str) -> str:
        """The words of the subject that a box matches."""
        if self.kind not in BY_TOKEN:
            return subject.strip()
        ids = inputs["input_ids"][0].cpu()
        words = ids[matches[: len(ids)]]
        return self.processor.tokenizer.decode(words, skip_special_tokens=True).replace(".", "").strip()


def is_detector(folder: Path) -> bool:
    return kind_of(folder)[0] in DETECTORS


def load_detector(folder: Path) -> Detector:
    """Load a folder with config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    kind, name = kind_of(folder)
    if kind not in DETECTORS:
        raise ValueError(
            f"The folder {folder.name} holds {name or 'no recognisable model'}, expected a detector that takes "
            f"a text ({', '.join(DETECTORS)}): choose a folder such as grounding-dino-tiny."
        )
    processor = read_processor(folder)  # first: it takes no time
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"The folder {folder.name} has no tokenizer files: copy the model's whole folder.")
    model, _ = read_model(folder, "AutoModelForZeroShotObjectDetection")
    return Detector(model, processor, folder.name)


def input_pixels(detector: Detector) -> float:
    """Approximate number of pixels in the detector's input."""
    size = getattr(detector.processor.image_processor, "size", None) or {}
    sides = [value for value in dict(size).values() if isinstance(value, int)]
    return float(max(sides, default=800)) ** 2
