"""The layers of a MODEL and a CLIP that a likeness optimisation trains, and their names in files.

Fine-tuning chooses its own, in sine/host/fine_tune.py; both begin with the names in low_rank.py.

Both stock LoRA loaders and diffusers can read these names: for UNets those of common training scripts
("lora_unet_..."), for transformers those of diffusers ("transformer....lora_A"). ComfyUI's own maps between the two
give the corresponding layers, and the rows of fused layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import comfy.model_base
import comfy.utils
from torch import Size, Tensor, nn

from ..low_rank import TEXT_LAYERS, TEXT_PREFIX, UNET_LAYERS, Layer, LowRank, Rows

# In FLUX's double-stream and single-stream blocks (SISO's script; in the latter the suffixes match only q, k, v).
FLUX_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
ENCODERS = ("clip_l", "clip_g", "clip_h")  # ComfyUI's names for the CLIP text encoders
MODEL_PREFIX = "diffusion_model."


@runtime_checkable
class HasLoraLayers(Protocol):
    """A ComfyUI model that declares its trainable layers itself: {name in a PEFT file: layer}."""

    def lora_layers(self) -> Mapping[str, nn.Module]: ...


@dataclass(frozen=True)
class LoraLayers:
    """Layers by unique key (TEXT_PREFIX starts a text encoder's), and their names in files; peft: in PEFT's format."""

    layers: dict[str, Layer]
    names: dict[str, str]
    peft: bool

    def numbers(self, rank: int) -> int:
        """Number of parameters of a LoRA of this rank."""
        return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in map(_shape, self.layers.values()))

    def tensors(self, adapters: Mapping[str, LowRank], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors. values: the factors, by "<key>.up" and "<key>.down"."""
        tensors: dict[str, Tensor] = {}
        for key, adapter in adapters.items():
            factors = {part: values[f"{key}.{part}"] for part in ("up", "down")}
            write = adapter.peft_tensors if self.peft else adapter.tensors
            tensors |= write(self.names[key], factors)
        return tensors


def _shape(layer: Layer) -> Size:
    if isinstance(layer, Rows):
        return Size([layer.count, *_shape(layer.layer)[1:]])
    return layer.state_dict()["weight"].shape  # the full weight's shape, also for quantised layers


def trained_layers(base: Any, text: nn.Module | None = None) -> LoraLayers:
    """The trained layers of a ComfyUI model (a MODEL's .model) and, if given, of a text encoder (a CLIP's
    cond_stage_model).

    ValueError when one of them has no layers known to the pack.
    """
    unet = cast(nn.Module, base.diffusion_model)
    peft = True
    if isinstance(base, HasLoraLayers):
        by_name: dict[str, Layer] = dict(base.lora_layers())
    elif isinstance(base, comfy.model_base.Flux) and base.model_config.unet_config.get("image_model") == "flux":
        by_name = _flux(unet, base.model_config.unet_config)
    else:
        by_name, peft = _unet(unet, base.model_config.unet_config), False
    if not by_name:
        raise ValueError(
            f"No attention layers that a LoRA of this pack knows are in this {type(base.model_config).__name__} "
            "model: use SD1.x, SD2.x, SDXL, FLUX.1 or Sana."
        )
    names = {MODEL_PREFIX + name: name for name in by_name}
    layers = {MODEL_PREFIX + name: layer for name, layer in by_name.items()}
    for name, layer in ({} if text is None else _text(text, peft)).items():
        names[TEXT_PREFIX + name], layers[TEXT_PREFIX + name] = name, layer
    return LoraLayers(layers, names, peft)


def _unet(unet: nn.Module, config: dict[str, Any]) -> dict[str, Layer]:
    parts = dict(unet.named_modules())
    layers: dict[str, Layer] = {}
    keys = comfy.utils.unet_to_diffusers(config) if "num_res_blocks" in config else {}
    for diffusers_name, comfy_name in keys.items():
        diffusers_name, comfy_name = diffusers_name.removesuffix(".weight"), comfy_name.removesuffix(".weight")
        if diffusers_name.endswith(UNET_LAYERS) and comfy_name in parts:
            layers["lora_unet_" + diffusers_name.replace(".", "_")] = parts[comfy_name]
    return layers


def _flux(flux: nn.Module, config: dict[str, Any]) -> dict[str, Layer]:
    parts = dict(flux.named_modules())
    layers: dict[str, Layer] = {}
    for name, target in comfy.utils.flux_to_diffusers(config).items():
        name, end = name.rpartition(".")[::2]
        if end == "weight" and name.endswith(FLUX_LAYERS):
            key, rows = target if isinstance(target, tuple) else (target, None)  # rows: (dimension, start, count)
            layer = parts[key.removesuffix(".weight")]
            layers[f"transformer.{name}"] = layer if rows is None else Rows(layer, *rows[1:])
    return layers


def _text(encoder: nn.Module, peft: bool) -> dict[str, Layer]:
    """The projections in the CLIP encoders; other encoders (T5) are not trained, as in the paper."""
    clips = [name for name in ENCODERS if hasattr(encoder, name)]
    if not clips:
        raise ValueError(
            "This text encoder has no CLIP part that a LoRA could be learned for: disconnect 'clip', and its prompt "
            "stays as it is."
        )
    layers: dict[str, Layer] = {}
    for index, name in enumerate(clips, 1):
        number = f"{index}" if len(clips) > 1 else ""
        for path, part in getattr(encoder, name).transformer.named_modules():
            if path.endswith(TEXT_LAYERS):
                kohya = f"lora_te{number}_" + path.replace(".", "_")
                layers[f"text_encoder.{path}" if peft else kohya] = part
    return layers
