"""Apply a fine-tune to a MODEL and a CLIP with ComfyUI's own LoRA loading."""

from __future__ import annotations

import logging
from typing import Any

import comfy.sd

from ...prompt.conditioning import Conditioning
from ..artifact import MODEL_PREFIXES, TEXT_PREFIXES, FineTunedWeights

log = logging.getLogger("likeness")


def apply_lora(tuned: FineTunedWeights, model: Any, clip: Any | None, strength: float) -> tuple[Any, Any | None]:
    """The fine-tuned MODEL and CLIP; the inputs are not changed. Strength 0 returns them as they are."""
    if strength == 0.0:
        return model, clip
    if clip is None and tuned.part(TEXT_PREFIXES):
        log.warning("The fine-tune has a text encoder too: connect a CLIP, or its prompt will not show the subject.")
    patched, _ = comfy.sd.load_lora_for_models(model, None, tuned.part(MODEL_PREFIXES), strength, 0.0)
    if clip is not None:
        _, clip = comfy.sd.load_lora_for_models(None, clip, tuned.part(TEXT_PREFIXES), 0.0, strength)
    return patched, clip


def encode_prompt(clip: Any, prompt: str) -> Conditioning:
    """The output of the stock Text Encode node."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
