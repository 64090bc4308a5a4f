"""Where EZIGen's adapter stands in ComfyUI's UNet: its layers, what is kept of them, and what is put behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ...attention.host.layers import Key
from ...session.weights import is_packed
from ..adapter import Adapter, Layer, SubjectTokens

PARTS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


@dataclass(frozen=True)
class Place:
    """A transformer block: its key in ComfyUI, its name in the module, and what the adapter needs to know of it."""

    key: Key
    module: str
    layer: Layer


def places(base: Any) -> list[Place]:
    """All transformer blocks of a ComfyUI model (a MODEL's .model) in the order in which they run.

    ValueError for a network that is not ComfyUI's UNet, or has none.
    """
    unet, config = base.diffusion_model, base.model_config.unet_config
    found = []
    if hasattr(unet, "input_blocks") and hasattr(unet, "output_blocks"):
        published = {native: name for name, native in comfy.utils.unet_to_diffusers(dict(config)).items()}
        for name, part in unet.named_modules():
            words = name.split(".")
            if len(words) < 3 or words[-2] != "transformer_blocks" or words[0] not in PARTS:
                continue
            number = 0 if words[0] == "middle_block" else int(words[1])
            official = published[f"{name}.attn1.to_q.weight"].removesuffix(".attn1.to_q.weight")
            attention = part.attn1
            layer = Layer(official, attention.to_q.weight.shape[0], attention.heads)
            found.append(Place((PARTS[words[0]], number, int(words[-1])), name, layer))
    if not found:
        raise ValueError(
            f"This model is a {type(unet).__name__}; the adapter stands in the transformer blocks of the UNet of "
            "SD1.x, SD2.x and SDXL: connect one of these."
        )
    return found


def new_adapter(base: Any) -> Adapter:
    """An adapter for a ComfyUI model, as the published training starts it: a copy of its self-attentions."""
    found, state = places(base), base.diffusion_model.state_dict()
    weights: dict[str, Tensor] = {}
    for place in found:
        begin = f"{place.module}."
        weights |= {f"{place.layer.name}.{k[len(begin) :]}": v for k, v in state.items() if k.startswith(begin)}
    with torch.inference_mode(False):
        with torch.device("meta"):  # torch's own start would draw from the global random numbers
            adapter = Adapter([place.layer for place in found])
        adapter.to_empty(device="cpu")
        adapter.start_from({name: value.detach().float() for name, value in weights.items()})
    return adapter


def packed_places(model: Any, found: list[Place]) -> bool:
    """Whether self-attentions of a MODEL are quantised: their weights then cannot be read as numbers."""
    blocks = [model.model.diffusion_model.get_submodule(place.module) for place in found]
    return any(is_packed(layer) for block in blocks for layer in block.attn1.modules())


def key_of(options: dict[str, Any]) -> Key:
    """Which block a patch is called in."""
    return (*options["block"], options.get("block_index", 0))


class Capture:
    """An attn1_patch that keeps what every self-attention is given; order() lists it as places() does."""

    def __init__(self) -> None:
        self._found: dict[Key, Tensor] = {}

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
        self._found[key_of(options)] = n.detach()
        return n, context, value

    def __deepcopy__(self, _memo: dict[int, Any]) -> Capture:
        return self  # ComfyUI copies the options of a MODEL deeply

    def order(self, found: list[Place]) -> list[Tensor]:
        """[R, N_i, C_i] of every place; forgets them."""
        kept, self._found = self._found, {}
        return [kept[place.key] for place in found]


def middle_patch(
    adapter: Adapter, found: list[Place], tokens: SubjectTokens | None, strength: float = 1.0
) -> Callable[[Tensor, dict[str, Any]], Tensor]:
    """A middle_patch that puts the adapter behind every self-attention, for the whole batch."""
    index = {place.key: number for number, place in enumerate(found)}

    def patch(h: Tensor, options: dict[str, Any]) -> Tensor:
        return adapter(index[key_of(options)], h, tokens, strength)

    return patch


class UNet:
    """A ComfyUI model's UNet as a Network (see ezigen_training.py), asked directly: for trainings of its own."""

    def __init__(self, base: Any, adapter: Adapter) -> None:
        """base: a MODEL's .model, loaded; its weights take part in a backward only where they require gradients."""
        self.unet, self.adapter, self.places = base.diffusion_model, adapter, places(base)
        self.dtype = base.manual_cast_dtype or base.get_dtype()
        sigmas = base.model_sampling.sigmas.detach().double().cpu()
        self.alphas_cumprod = (1 / (1 + sigmas**2)).float()

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        kept = Capture()
        self._run(z, timestep, context, {"attn1_patch": [kept]})
        return kept.order(self.places)

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens | None) -> Tensor:
        return self._run(z, timestep, context, {"middle_patch": [middle_patch(self.adapter, self.places, tokens)]})

    def bare_noise(self, z: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """[B, C, h, w] of the UNet alone: the adapter is skipped."""
        return self._run(z, timestep, context, {})

    def _run(self, z: Tensor, timestep: Tensor, context: Tensor, patches: dict[str, Any]) -> Tensor:
        options = {"patches": patches, "optimized_attention_override": _differentiable}
        z, context = z.to(self.dtype), context.to(self.dtype)
        return self.unet(z, timestep.float(), context=context, transformer_options=options).float()


def _differentiable(_chosen: Any, *args: Any, **more: Any) -> Tensor:
    return attention_pytorch(*args, **more)
