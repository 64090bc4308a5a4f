"""The small world at its trained width, for trainings inside a test: a folder of its subjects, and its text encoder as
a CLIP.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch


class NarrowCLIP:
    """What a training asks of a CLIP, of the narrow text encoder."""

    layer_idx, tokenizer_options = None, {}

    def __init__(self, narrow: Any) -> None:
        self.narrow, self.patcher = narrow, copy.copy(narrow.model)
        self.patcher.model = narrow.text

    def tokenize(self, text: str) -> dict[str, list[str]]:
        return {"l": [text]}

    def encode_from_tokens(self, tokens: dict[str, list[str]]) -> torch.Tensor:
        return self.narrow.encode(tokens["l"][0])


def training(folder: Any, settings: Any, steps: int) -> Any:
    """A training of the small world's models."""
    from likeness.core.ezigen.host.train import AdapterJob
    from likeness.toyworld.narrow import load_narrow

    narrow = load_narrow()
    return AdapterJob(narrow.model, NarrowCLIP(narrow), narrow.vae, folder, settings, steps)


def draw(folder: Path, subjects: range, pictures: int) -> Path:
    """Images of subjects in several places, with captions and masks."""
    from likeness.toyworld.workflows import draw_training_set

    return draw_training_set(folder, subjects, pictures)
