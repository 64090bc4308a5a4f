"""A transformers folder of an image-to-text model (BLIP-2, BLIP, GIT) -> a caption. Read from disk only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .offline import offline, reason
from .transformers_folder import kind_of, read_model, read_processor

CLASSES = ("ForConditionalGeneration", "ForImageTextToText", "ForVision2Seq")  # endings of class names
ALSO = ("GitForCausalLM",)
BYTES = 1e9  # upper estimate of the activations of one image, for ComfyUI's memory management


class Captioner(nn.Module):
    """An image-to-text model with its processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.description = f"{name} ({type(model).__name__})"

    def forward(self, image: np.ndarray, max_tokens: int) -> str:
        """A caption for an image, uint8 [H, W, 3], by greedy decoding, the default for BLIP-2."""
        first = next(self.model.parameters())
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        try:
            with offline():
                inputs = self.processor(images=image, return_tensors="pt").to(first.device)
                inputs["pixel_values"] = inputs["pixel_values"].to(first.dtype)
                ids = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
                text = tokenizer.batch_decode(ids, skip_special_tokens=True)[0]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # or it needs a text prompt
            raise ValueError(
                f"{self.description} gives no caption for an image alone ({reason(error)}): choose a captioning "
                "model such as blip2-opt-2.7b or blip-image-captioning-base."
            ) from error
        return " ".join(text.split())


def is_captioner(folder: Path) -> bool:
    name = kind_of(folder)[1]
    return name.endswith(CLASSES) or name in ALSO


def load_captioner(folder: Path, dtype: torch.dtype) -> Captioner:
    """Load a folder with config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    if not is_captioner(folder):
        raise ValueError(
            f"The folder {folder.name} holds {kind_of(folder)[1] or 'no recognisable model'}, expected one that "
            "writes captions: choose a folder such as blip2-opt-2.7b or blip-image-captioning-base."
        )
    processor = read_processor(folder)  # first: it takes no time
    model, _ = read_model(folder, "AutoModelForImageTextToText", dtype)
    return Captioner(model, processor, folder.name)
