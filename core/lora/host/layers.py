"""The layers of a MODEL and a CLIP that get a LoRA, and their names in files.

Which layers a network has is asked of its structure (low_rank.py), and ComfyUI's own paths are their names, which its
loader reads for every model. A likeness optimisation writes the names that diffusers reads too, where ComfyUI has a map
to them: for UNets those of common training scripts ("lora_unet_..."), for FLUX.1 those of diffusers
("transformer....lora_A"), with the rows of fused layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import comfy.utils
from torch import Tensor, nn

from ..low_rank import (
    ATTENTION,
    TEXT_PREFIX,
    Layer,
    Rows,
    attention_layers,
    block_layers,
    file_tensors,
    hidden_layers,
    module_of,
    sizes,
)

# In FLUX's double-stream and single-stream blocks (SISO's script; in the latter the suffixes match only q, k, v).
FLUX_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
FLUX_OPTIONAL = ("guidance_in.", "pos_embed_input.")  # of guidance-distilled models, of ControlNets
ENCODERS = ("clip_l", "clip_g", "clip_h")  # ComfyUI's names for the CLIP text encoders
NETWORK = "diffusion_model"
MODEL_PREFIX = f"{NETWORK}."


@dataclass(frozen=True)
class LoraLayers:
    """Layers by unique key (TEXT_PREFIX starts a text encoder's), and their names in files; peft: in PEFT's format."""

    layers: dict[str, Layer]
    names: dict[str, str]
    peft: bool

    def numbers(self, rank: int) -> int:
        return sum(rank * sum(sizes(layer)) for layer in self.layers.values())

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors. values: the factors, by "<key>.up" and "<key>.down"."""
        tensors: dict[str, Tensor] = {}
        for key, name in self.names.items():
            tensors |= file_tensors(name, values[f"{key}.up"], values[f"{key}.down"], self.peft)
        return tensors


def network_layers(base: Any, kind: str = ATTENTION) -> dict[str, nn.Module]:
    """The linear layers of a ComfyUI model (a MODEL's .model) to train, by ComfyUI's paths; ValueError for none."""
    network, family = cast(nn.Module, base.diffusion_model), type(base.model_config).__name__
    hidden = hidden_layers(network)
    if hidden:
        path, packed = next(iter(hidden.items()))
        raise ValueError(
            f"{len(hidden)} layers of this {family} model, such as '{path}' ({packed}), hold packed weights and do not "
            "tell their size, expected are linear layers: load it in bf16, fp16, fp32 or fp8."
        )
    layers = block_layers(network, NETWORK, kind)
    if not layers:
        raise ValueError(
            f"The blocks of this {family} model hold no attention made of linear layers, "
            "expected by a LoRA: train full weights, or use another file of the model (not fused or compiled)."
        )
    return layers


def trained_layers(base: Any, text: nn.Module | None = None, kind: str = ATTENTION) -> LoraLayers:
    """The layers that a likeness optimisation trains of a ComfyUI model and, if given, of a text encoder (a CLIP's
    cond_stage_model). ValueError when one of them has none.
    """
    by_name, peft = _published(base) if kind == ATTENTION else ({}, False)
    network = (MODEL_PREFIX, by_name) if by_name else ("", network_layers(base, kind))
    parts = (network, (TEXT_PREFIX, {} if text is None else _text(text, peft)))
    layers = {prefix + name: layer for prefix, part in parts for name, layer in part.items()}
    names = {prefix + name: name for prefix, part in parts for name in part}
    return LoraLayers(layers, names, peft)


def check_run(network: nn.Module, layers: Mapping[str, Layer], called: Collection[int]) -> None:
    """RuntimeError for layers whose weights a network uses without running them: nothing can be added to their output.

    called: the ids of the modules that ran in a prediction.
    """
    owners = {id(part): owner for owner in network.modules() for part in owner.children()}
    ids = {name: id(module_of(layer)) for name, layer in layers.items()}
    fused = [name for name, key in ids.items() if key in owners and key not in called and id(owners[key]) in called]
    if fused:
        raise RuntimeError(
            f"{len(fused)} of the {len(layers)} layers to be trained, such as '{fused[0]}', are fused with others in "
            "this model, expected are layers that run by themselves: connect the model before the node that fuses "
            "them, or load another file of it."
        )


def _published(base: Any) -> tuple[dict[str, Layer], bool]:
    """The layers that the methods' own scripts train, by names that diffusers reads too, and whether these are PEFT's;
    nothing where there are no such names.
    """
    network, config = cast(nn.Module, base.diffusion_model), base.model_config.unet_config
    layers: dict[str, Layer] = {}
    if hasattr(base, "lora_layers"):  # a model that declares them itself: {name in a PEFT file: layer}
        return dict(base.lora_layers()), True
    if "num_res_blocks" in config:
        attention = block_layers(network, NETWORK)
        for name, target in comfy.utils.unet_to_diffusers(config).items():
            path = MODEL_PREFIX + target.removesuffix(".weight")
            if target.endswith(".weight") and path in attention:
                layers["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = attention[path]
        return layers, False
    keys = comfy.utils.flux_to_diffusers(config) if "depth_single_blocks" in config else {}
    targets = [target[0] if isinstance(target, tuple) else target for target in keys.values()]
    known = network.state_dict().keys()
    if not all(target in known or target.startswith(FLUX_OPTIONAL) for target in targets):
        return {}, False
    parts = dict(network.named_modules())
    for name, target in keys.items():
        name, end = name.rpartition(".")[::2]
        if end == "weight" and name.endswith(FLUX_LAYERS):
            key, rows = target if isinstance(target, tuple) else (target, None)  # rows: (dimension, start, count)
            layer = parts[key.removesuffix(".weight")]
            layers[f"transformer.{name}"] = layer if rows is None else Rows(layer, *rows[1:])
    return layers, bool(keys)


def _text(encoder: nn.Module, peft: bool) -> dict[str, Layer]:
    """The projections in the CLIP encoders; other encoders (T5) are not trained, as in the paper."""
    clips = [name for name in ENCODERS if getattr(encoder, name, None) is not None]  # SD3 also loads without some
    if not clips:
        raise ValueError(
            "This text encoder has no CLIP part that a LoRA could be learned for: disconnect 'clip', and its prompt "
            "stays as it is."
        )
    layers: dict[str, Layer] = {}
    for index, name in enumerate(clips, 1):
        number = f"{index}" if len(clips) > 1 else ""
        for path, part in attention_layers(getattr(encoder, name).transformer, name).items():
            path = path.removeprefix(f"{name}.")
            kohya = f"lora_te{number}_" + path.replace(".", "_")
            layers[f"text_encoder.{path}" if peft else kohya] = part
    return layers
