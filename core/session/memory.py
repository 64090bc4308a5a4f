"""Memory of a gradient session beyond the models' weights: estimates, and messages when it does not fit.

The estimates cover what autograd stores between the forward and the backward pass, based on the layers' shapes, and err
on the high side.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_base
import comfy.model_management as mm
from torch import Tensor, nn

from ..lora.low_rank import block_lists

log = logging.getLogger("likeness")
GB = 2**30

# ComfyUI's estimates are for one forward pass, while backward needs every activation: the factor for a decoder, or a
# model with its own estimate.
ACTIVATION_FACTORS = 4.0, 1.5  # without and with checkpointing
# The factor for ComfyUI's UNets and transformers, relative to its estimate for one pass with fused attention. Measured
# at the published widths (benchmarks.memory_similarity): 9 and 2 for SD1.x, 20 and 3 for SDXL, 25 and 3 for FLUX.1.
NETWORK_FACTORS = 25.0, 3.0
BYTES_PER_PASS = 0.01 * 2**20  # for each byte of a latent's pixel
BYTES_PER_WEIGHT = 16  # of a trained weight in float32: the weight, its gradient, Adam's two moments
BYTES_PER_FEATURE = 72.0  # of a transformer layer, per token and channel in float32 (41 with fused attention)
ADVICE = (
    "switch checkpointing on, make the image smaller, let fewer steps have a gradient, disconnect the text encoder, "
    "or load the model as fp8"
)


def activations(model: Any, latent: Tensor, checkpointing: bool) -> float:
    """Bytes that one prediction of a MODEL for a latent [1, C, h, w] stores for its backward pass."""
    base = model.model
    if type(base).memory_required is not comfy.model_base.BaseModel.memory_required:
        return ACTIVATION_FACTORS[checkpointing] * base.memory_required([1, *latent.shape[1:]])
    size = mm.dtype_size(model.get_model_object("manual_cast_dtype") or base.get_dtype())  # as set by the session
    network_factor = NETWORK_FACTORS[checkpointing and bool(block_lists(base.diffusion_model))]
    return network_factor * BYTES_PER_PASS * base.memory_usage_factor * size * math.prod(latent.shape[2:])


def decoding_memory(vae: Any, latent: Tensor, checkpointing: bool) -> float:
    """Bytes that decoding with gradients stores for its backward pass."""
    return ACTIVATION_FACTORS[checkpointing] * vae.memory_used_decode(tuple(latent.shape), vae.vae_dtype)


def vision_memory(vision: Any, checkpointing: bool) -> float:
    """Bytes that a CLIP_VISION stores for the gradient of one image."""
    patches = next((part for part in vision.model.modules() if isinstance(part, nn.Conv2d)), None)
    if patches is None:
        return 0.0
    side = getattr(vision.model, "trained_side", None) or vision.image_size
    width, tokens = patches.out_channels, (side / patches.stride[0]) ** 2
    layers = max((len(part) for part in vision.model.modules() if isinstance(part, nn.ModuleList)), default=1)
    whole = BYTES_PER_FEATURE * tokens * width
    return whole + 4 * tokens * width * layers if checkpointing else whole * layers


def size_on(models: Iterable[Any], device: Any) -> float:
    """Bytes of the weights of the ModelPatchers that run on a device; others (--lowvram, --cpu-vae) need none there."""
    return sum(model.model_size() for model in models if model.load_device == device)


def check_room(models: list[Any], needed: float, device: Any) -> None:
    """Report, before any work, that models (ModelPatchers) and the memory they need exceed the device's memory.

    RuntimeError when the weights alone do not fit; a warning when only the estimate does not, since it may be too high.
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
def explain_out_of_memory() -> Iterator[None]:
    """Make an out-of-memory error say what to change; its type stays the same, since ComfyUI unloads models on it."""
    try:
        yield
    except mm.OOM_EXCEPTION as error:
        if mm.OOM_EXCEPTION is Exception:  # ComfyUI's fallback where torch has no such error
            raise
        raise type(error)(f"The gradient does not fit into memory ({str(error)[:200]}): {ADVICE}.") from error
