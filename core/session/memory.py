"""What a gradient session needs beside the models' weights: estimates, and what is said when it is too much.

The estimates are of what autograd keeps between a forward and a backward pass, counted on the layers' shapes; they are
made to be rather too high than too low.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_base
import comfy.model_management as mm
from torch import Tensor, nn

log = logging.getLogger("likeness")
GB = 2**30

# Backward keeps every activation, estimates of ComfyUI's kind are for one forward pass: so many times as much for a
# decoder, or a model that makes its own estimate.
ACTIVATION_FACTOR, ACTIVATION_FACTOR_CHECKPOINTED = 4.0, 1.5
# For ComfyUI's UNets and transformers, of what it takes a pass to need where attention is computed in one kernel.
# Counted on the published widths (benchmarks.memory_similarity): 9 and 2 for SD1.x, 20 and 3 for SDXL, 25 and 3 for
# FLUX.1.
HELD, HELD_CHECKPOINTED = 25.0, 3.0
PASS = 0.01 * 2**20  # bytes for each byte of a latent's pixel
BYTES_PER_WEIGHT = 16  # of a trained one, in float32: itself, its gradient, Adam's two moments
BYTES_PER_FEATURE = (
    72.0  # of a transformer layer, for each token and channel in float32 (41 where all is in one kernel)
)
ADVICE = (
    "switch checkpointing on, make the image smaller, let fewer steps have a gradient, disconnect the text encoder, "
    "or load the model as fp8"
)


def factor(checkpointing: bool) -> float:
    """Of ComfyUI's estimate for one pass without a gradient."""
    return ACTIVATION_FACTOR_CHECKPOINTED if checkpointing else ACTIVATION_FACTOR


def activations(model: Any, latent: Tensor, checkpointing: bool) -> float:
    """Bytes that one prediction of a MODEL for a latent [1, C, h, w] holds for its backward."""
    base = model.model
    if type(base).memory_required is not comfy.model_base.BaseModel.memory_required:
        return factor(checkpointing) * base.memory_required([1, *latent.shape[1:]])
    size = mm.dtype_size(model.get_model_object("manual_cast_dtype") or base.get_dtype())  # as a session has set it
    held = HELD_CHECKPOINTED if checkpointing else HELD
    return held * PASS * base.memory_usage_factor * size * math.prod(latent.shape[2:])


def decoding_memory(vae: Any, latent: Tensor, checkpointing: bool) -> float:
    """Bytes that a decoding with a gradient holds."""
    return factor(checkpointing) * vae.memory_used_decode(tuple(latent.shape), vae.vae_dtype)


def vision_memory(vision: Any, checkpointing: bool) -> float:
    """Bytes that a CLIP_VISION holds for the gradient of one image."""
    patches = next((part for part in vision.model.modules() if isinstance(part, nn.Conv2d)), None)
    if patches is None:
        return 0.0
    side = getattr(vision.model, "trained_side", None) or vision.image_size
    width, tokens = patches.out_channels, (side / patches.stride[0]) ** 2
    layers = max((len(part) for part in vision.model.modules() if isinstance(part, nn.ModuleList)), default=1)
    whole = BYTES_PER_FEATURE * tokens * width
    return whole + 4 * tokens * width * layers if checkpointing else whole * layers


def size_on(models: Iterable[Any], device: Any) -> float:
    """Bytes of weights of the ModelPatchers that are computed on a device: others (--lowvram, --cpu-vae) need none."""
    return sum(model.model_size() for model in models if model.load_device == device)


def check_room(models: list[Any], needed: float, device: Any) -> None:
    """Say what to change, before any work, when models (ModelPatchers) and what they need exceed the device's memory.

    RuntimeError when the weights alone do; a warning when the estimate does, since it may be too high.
    """
    total, weights = mm.get_total_memory(device), size_on(models, device)
    if weights > total:
        raise RuntimeError(
            f"The models have {weights / GB:.1f} GB of weights, and the device has {total / GB:.1f} GB of memory: they "
            "must fit all at once to be trained through. Load the model as fp8, disconnect the text encoder, or use a "
            "smaller model."
        )
    if weights + needed > total:
        log.warning(
            "This run may need about %.1f GB (%.1f of weights, %.1f for the gradient), and the device has %.1f GB. If "
            "it runs out of memory: %s.",
            *((weights + needed) / GB, weights / GB, needed / GB, total / GB, ADVICE),
        )


@contextlib.contextmanager
def told_when_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to change, of the same kind: ComfyUI unloads on it."""
    try:
        yield
    except mm.OOM_EXCEPTION as error:
        if mm.OOM_EXCEPTION is Exception:  # ComfyUI's stand-in where torch knows no such error
            raise
        raise type(error)(f"The gradient does not fit into memory ({str(error)[:200]}): {ADVICE}.") from error
