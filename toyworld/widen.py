"""Exact widening: from the narrow trained networks to the SD1.x widths that ComfyUI's loader expects.

Every narrow channel is repeated r times and the weights that read it are divided by r (Net2Wider, T. Chen and others,
2016). Normalisation statistics do not change, attention scores are corrected in the query weights: the wide network
computes the same function. The autoencoder needs no repetition: TAESD has no normalisation, so its missing channels are
zero. The checkpoint is stored in fp16; `as_stored` gives the narrow weights the very same rounding, so that narrow and
wide agree to fp32 accuracy.
"""

from __future__ import annotations

import math

import torch

from ..core.ezigen.adapter import WEIGHTS
from .networks import CHANNELS, CONTEXT, END_OF_TEXT, HEAD_WIDTH, ROWS, TEXT_LAYERS, WIDE_CHANNELS

UNET_REPEATS = WIDE_CHANNELS // CHANNELS
WIDE_CONTEXT, WIDE_HEAD_WIDTH, WIDE_TEXT_LAYERS = 768, 64, 12
TEXT_REPEATS = WIDE_CONTEXT // CONTEXT
# ComfyUI multiplies SD1.x latents by this number before they reach the UNet.
SD15_LATENT_SCALE = 0.18215
Tensors = dict[str, torch.Tensor]


def _repeats_input(key: str) -> int:
    """How often the channels that a UNet weight reads are repeated (1: latents and time sinusoids are not)."""
    if key.startswith(("input_blocks.0.0.", "time_embed.0.")):
        return 1
    return TEXT_REPEATS if ".attn2.to_k." in key or ".attn2.to_v." in key else UNET_REPEATS


def unet_factor(key: str, dimensions: int) -> float:
    """What a UNet tensor is multiplied by when it is widened."""
    if dimensions == 1:
        return 1.0
    factor = 1 / _repeats_input(key)
    return factor / math.sqrt(UNET_REPEATS) if ".to_q." in key else factor


def text_factor(key: str, dimensions: int) -> float:
    """What a text encoder tensor is multiplied by when it is widened."""
    factor = 1.0
    if dimensions == 2 and key.startswith("layers."):
        factor /= TEXT_REPEATS
    return factor / math.sqrt(WIDE_HEAD_WIDTH // HEAD_WIDTH) if ".q_proj." in key else factor


def rounded(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """A tensor times `factor`, as the wide file stores it."""
    return (tensor.float() * factor).half()


def as_stored(narrow: Tensors) -> Tensors:
    """The narrow tensors in fp32 with the rounding of the wide fp16 file."""
    result = {}
    for key, value in narrow.items():
        if not value.is_floating_point():
            continue
        part, _, rest = key.partition(".")
        factor = {"unet": unet_factor, "text": text_factor}.get(part, lambda *_: 1.0)(rest, value.ndim)
        result[key] = rounded(value, factor).float() / factor if part != "latent" else value.float()
    return result


def widen_unet(narrow: Tensors) -> Tensors:
    """Narrow UNet tensors -> SD1.x tensors, fp16."""
    wide = {}
    for key, value in narrow.items():
        value = rounded(value, unet_factor(key, value.ndim))
        if value.ndim > 1 and _repeats_input(key) > 1:
            value = value.repeat_interleave(_repeats_input(key), 1)
        wide[key] = value if key.startswith("out.2.") else value.repeat_interleave(UNET_REPEATS, 0)
    return wide


def widen_adapter(narrow: Tensors) -> Tensors:
    """Tensors of a subject adapter for the narrow UNet, by published names -> for the wide one, fp16."""
    weights = {key: value for key, value in narrow.items() if key == WEIGHTS}
    return {**weights, **widen_unet({key: value for key, value in narrow.items() if key != WEIGHTS})}


def clip_layout(narrow: Tensors, vocabulary: list[int]) -> Tensors:
    """Narrow text encoder tensors by CLIP's names: its table of ids, and twelve layers, the unused ones zero (they add
    nothing).
    """
    rows = narrow["token_embedding.weight"]
    table = rows[-1:].expand(END_OF_TEXT + 1, -1).clone()
    table[torch.tensor(vocabulary)] = rows[:-1]
    named = {"embeddings.token_embedding.weight": table}
    named["embeddings.position_embedding.weight"] = narrow["position_embedding.weight"]
    named |= {f"final_layer_norm.{name}": narrow[f"final_layer_norm.{name}"] for name in ("weight", "bias")}
    first = {key: value for key, value in narrow.items() if key.startswith("layers.0.")}
    for layer in range(WIDE_TEXT_LAYERS):
        for key, like in first.items():
            key = key.replace("layers.0.", f"layers.{layer}.")
            named[f"encoder.{key}"] = narrow[key] if layer < TEXT_LAYERS else torch.zeros_like(like)
    return {f"text_model.{key}": value for key, value in named.items()}


def widen_text(narrow: Tensors, vocabulary: list[int]) -> Tensors:
    """Narrow text encoder tensors -> CLIP-L tensors, fp16."""
    wide: Tensors = {"text_model.embeddings.position_ids": torch.arange(ROWS)[None]}
    for key, value in clip_layout(narrow, vocabulary).items():
        value = rounded(value, text_factor(key.removeprefix("text_model.encoder."), value.ndim))
        within = value.ndim == 2 and ".encoder." in key
        value = value.repeat_interleave(TEXT_REPEATS, 0) if within or value.ndim == 1 else value
        wide[key] = value.repeat_interleave(TEXT_REPEATS, 1) if value.ndim == 2 else value
    return wide


def widen_autoencoder(
    narrow: Tensors, shift: float, scale: float, factor: float = SD15_LATENT_SCALE, offset: float = 0.0
) -> Tensors:
    """Narrow encoder and decoder tensors -> TAESD tensors, fp16, padded with zeros.

    `shift` and `scale` normalise raw latents for the network: (raw - shift) / scale. ComfyUI gives the network what its
    VAE encodes minus `offset`, times `factor`.
    """
    from comfy.taesd.taesd import TAESD

    taesd = TAESD(latent_channels=len(narrow["encoder.14.bias"]))
    wide = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in taesd.state_dict().items()}
    for key, value in narrow.items():
        wide[f"taesd_{key}"][tuple(slice(0, size) for size in value.shape)] = value.half()
    vae_scale = factor * scale
    return {**wide, "vae_scale": torch.tensor(vae_scale), "vae_shift": torch.tensor(offset - shift / vae_scale)}


def part_of(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def checkpoint(narrow: Tensors, vocabulary: list[int]) -> Tensors:
    """The whole SD1.x checkpoint from the narrow tensors unet.*, text.*, encoder.*, decoder.*, latent.shift/scale."""
    autoencoder = {key: value for key, value in narrow.items() if key.startswith(("encoder.", "decoder."))}
    parts = {
        "model.diffusion_model.": widen_unet(part_of(narrow, "unet.")),
        "cond_stage_model.transformer.": widen_text(part_of(narrow, "text."), vocabulary),
        "first_stage_model.": widen_autoencoder(
            autoencoder, float(narrow["latent.shift"]), float(narrow["latent.scale"])
        ),
    }
    return {prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.items()}
