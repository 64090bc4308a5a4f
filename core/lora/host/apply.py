"""Putting a fine-tuning on a MODEL and a CLIP: by ComfyUI's own LoRA loading."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd

from ...prompt.conditioning import Conditioning
from ..artifact import MODEL, TEXT, Tuned

log = logging.getLogger("likeness")


def apply_tuned(tuned: Tuned, model: Any, clip: Any | None, strength: float) -> tuple[Any, Any | None]:
    """The tuned MODEL and CLIP; the given ones are not changed. Strength 0 gives them back as they are."""
    if strength == 0.0:
        return model, clip
    if clip is None and tuned.part(TEXT):
        log.warning("The fine-tune has a text encoder too: connect a CLIP, or its prompt will not show the subject.")
    patched, _ = comfy.sd.load_lora_for_models(model, None, tuned.part(MODEL), strength, 0.0)
    if clip is not None:
        _, clip = comfy.sd.load_lora_for_models(None, clip, tuned.part(TEXT), 0.0, strength)
    return patched, clip


def encode_prompt(clip: Any, prompt: str) -> Conditioning:
    """What the stock Text Encode node gives."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
