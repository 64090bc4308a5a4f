"""Where learned tokens stand in a prompt: asked of the prompt, and of the tokenizer that a MODEL names as its own."""

from __future__ import annotations

import functools
from typing import Any

from ..conditioning import APPENDED, CHUNK, MASK, TAIL_OF_PADDING, Conditioning, Placement


def placement_for(model: Any, prompt: Conditioning) -> Placement:
    """Tokens replace the padding of an encoder that pads every prompt to one length; to others' they are appended."""
    rows, options = prompt[0]
    mask = options.get(MASK)
    if not bool(rows[0, -1].any()) or mask is not None and not bool(mask[..., -1].any()):
        return TAIL_OF_PADDING  # zeros, or masked
    target = getattr(model.model.model_config, "clip_target", lambda: None)()
    pads = None if target is None else _pads(target.tokenizer)
    if pads is None:  # CLIP's tables are padded, and language models as a rule are not
        pads = rows.shape[1] % CHUNK == 0
    return TAIL_OF_PADDING if pads else APPENDED


@functools.cache
def _pads(tokenizer: type) -> bool | None:
    """Whether a short prompt has as many tokens as an empty one; None for a tokenizer that is part of a model file."""
    try:
        encode = tokenizer(embedding_directory=None, tokenizer_data={}).tokenize_with_weights
        empty, short = encode(""), encode("a photo of a small dog")
    except Exception:  # whatever it lacks
        return None
    return all(len(empty[name][0]) == len(short[name][0]) for name in empty)
