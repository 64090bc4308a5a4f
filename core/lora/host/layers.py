"""Which layers of a MODEL and a CLIP a likeness optimisation trains, and how files name them.

The names are such that stock LoRA loaders and diffusers both read the file: for UNets the names that the field's
training scripts write ("lora_unet_..."), for transformers diffusers' own ("transformer....lora_A"). ComfyUI's own maps
between them say which of its layers is which, and which rows of a layer that does the work of three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import comfy.model_base
import comfy.utils
from torch import Size, Tensor, nn

from ..low_rank import TEXT, TEXT_LAYERS, UNET_LAYERS, Layer, LowRank, Rows

# Of FLUX's two-stream blocks, and of its one-stream blocks (SISO's script; the suffixes hit the latter's q, k, v only).
FLUX_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
ENCODERS = ("clip_l", "clip_g", "clip_h")  # ComfyUI's names of the CLIP text encoders
MODEL = "diffusion_model."


@runtime_checkable
class NamesItsLayers(Protocol):
    """A ComfyUI model that says itself what is to be trained: {name in a PEFT file: layer}."""

    def lora_layers(self) -> Mapping[str, nn.Module]: ...


@dataclass(frozen=True)
class Trained:
    """Layers by unique keys (a text encoder's begin with TEXT), and what files call each, in PEFT's manner or not."""

    layers: dict[str, Layer]
    names: dict[str, str]
    peft: bool

    def numbers(self, rank: int) -> int:
        """How many a LoRA of this rank has."""
        return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in map(_shape, self.layers.values()))

    def tensors(self, adapters: Mapping[str, LowRank], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors. values: the factors, by "<key>.up" and "<key>.down"."""
        found: dict[str, Tensor] = {}
        for key, adapter in adapters.items():
            factors = {part: values[f"{key}.{part}"] for part in ("up", "down")}
            write = adapter.peft_tensors if self.peft else adapter.tensors
            found |= write(self.names[key], factors)
        return found


def _shape(layer: Layer) -> Size:
    if isinstance(layer, Rows):
        return Size([layer.count, *_shape(layer.layer)[1:]])
    return layer.state_dict()["weight"].shape  # quantised layers, too, tell the whole weight's here


def trained_layers(base: Any, text: nn.Module | None = None) -> Trained:
    """Of a ComfyUI model (a MODEL's .model) and, if given, of a text encoder (a CLIP's cond_stage_model).

    ValueError when the pack knows no layers in one of them.
    """
    unet = cast(nn.Module, base.diffusion_model)
    peft = True
    if isinstance(base, NamesItsLayers):
        found: dict[str, Layer] = dict(base.lora_layers())
    elif isinstance(base, comfy.model_base.Flux) and base.model_config.unet_config.get("image_model") == "flux":
        found = _flux(unet, base.model_config.unet_config)
    else:
        found, peft = _unet(unet, base.model_config.unet_config), False
    if not found:
        raise ValueError(
            f"No attention layers that a LoRA of this pack knows are in this {type(base.model_config).__name__} "
            "model: use SD1.x, SD2.x, SDXL, FLUX.1 or Sana."
        )
    names = {MODEL + name: name for name in found}
    layers = {MODEL + name: layer for name, layer in found.items()}
    for name, layer in ({} if text is None else _text(text, peft)).items():
        names[TEXT + name], layers[TEXT + name] = name, layer
    return Trained(layers, names, peft)


def _unet(unet: nn.Module, config: dict[str, Any]) -> dict[str, Layer]:
    parts = dict(unet.named_modules())
    found: dict[str, Layer] = {}
    known = comfy.utils.unet_to_diffusers(config) if "num_res_blocks" in config else {}
    for theirs, ours in known.items():
        theirs, ours = theirs.removesuffix(".weight"), ours.removesuffix(".weight")
        if theirs.endswith(UNET_LAYERS) and ours in parts:
            found["lora_unet_" + theirs.replace(".", "_")] = parts[ours]
    return found


def _flux(flux: nn.Module, config: dict[str, Any]) -> dict[str, Layer]:
    parts = dict(flux.named_modules())
    found: dict[str, Layer] = {}
    for theirs, place in comfy.utils.flux_to_diffusers(config).items():
        theirs, end = theirs.rpartition(".")[::2]
        if end == "weight" and theirs.endswith(FLUX_LAYERS):
            ours, rows = place if isinstance(place, tuple) else (place, None)  # rows: (dimension, start, count)
            layer = parts[ours.removesuffix(".weight")]
            found[f"transformer.{theirs}"] = layer if rows is None else Rows(layer, *rows[1:])
    return found


def _text(encoder: nn.Module, peft: bool) -> dict[str, Layer]:
    """The projections of its CLIP parts; another part (T5) stays as it is, as published."""
    here = [name for name in ENCODERS if hasattr(encoder, name)]
    if not here:
        raise ValueError(
            "This text encoder has no CLIP part that a LoRA could be learned for: disconnect 'clip', and its prompt "
            "stays as it is."
        )
    found: dict[str, Layer] = {}
    for index, name in enumerate(here, 1):
        number = f"{index}" if len(here) > 1 else ""
        for path, part in getattr(encoder, name).transformer.named_modules():
            if path.endswith(TEXT_LAYERS):
                kohya = f"lora_te{number}_" + path.replace(".", "_")
                found[f"text_encoder.{path}" if peft else kohya] = part
    return found
