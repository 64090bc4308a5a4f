"""EZIGen's adapter in ComfyUI's UNet: its layers, the capture of their inputs, and the patch that applies it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...attention.host.layers import Key, transformer_layers
from ...session.weights import differentiable_attention, is_packed
from ..adapter import Adapter, Layer, SubjectTokens


@dataclass(frozen=True)
class Place:
    """A transformer block: its key in ComfyUI, its module name, and its Layer for the adapter."""

    key: Key
    module: str
    layer: Layer


def places(base: Any) -> list[Place]:
    """All transformer blocks of a ComfyUI model (a MODEL's .model), in execution order; ValueError for none."""
    unet, end = base.diffusion_model, ".attn1.to_q.weight"
    layers = transformer_layers(unet)
    if not layers:
        raise ValueError(
            f"This model is a {type(unet).__name__}; the adapter stands in the transformer blocks of the UNet of "
            "SD1.x, SD2.x and SDXL: connect one of these."
        )
    names = comfy.utils.unet_to_diffusers(dict(base.model_config.unet_config)).items()
    published = {native.removesuffix(end): name.removesuffix(end) for name, native in names if native.endswith(end)}
    blocks = []
    for key, path in layers.items():
        attention = unet.get_submodule(f"{path}.attn1")
        blocks.append(Place(key, path, Layer(published[path], attention.to_q.weight.shape[0], attention.heads)))
    return blocks


def new_adapter(base: Any) -> Adapter:
    """An adapter for a ComfyUI model with the published initialisation, a copy of its self-attentions."""
    blocks, weights = places(base), dict[str, Tensor]()
    for place in blocks:
        weights |= base.diffusion_model.get_submodule(place.module).state_dict(prefix=f"{place.layer.name}.")
    with torch.inference_mode(False):
        with torch.device("meta"):  # torch's initialisation would use the global generator
            adapter = Adapter([place.layer for place in blocks])
        adapter.to_empty(device="cpu")
        adapter.start_from({name: value.detach().float() for name, value in weights.items()})
    return adapter


def has_quantised_attention(model: Any, blocks: list[Place]) -> bool:
    """Whether a MODEL's self-attentions are quantised, so that their weights cannot be read."""
    modules = [model.model.diffusion_model.get_submodule(place.module) for place in blocks]
    return any(is_packed(layer) for module in modules for layer in module.attn1.modules())


def key_of(options: dict[str, Any]) -> Key:
    """The key of the block that calls a patch."""
    return (*options["block"], options.get("block_index", 0))


def capture(inputs: dict[Key, Tensor]) -> Callable[..., Any]:
    """An attn1_patch that records the input [R, N_i, C_i] of every self-attention, by its block's key."""

    def patch(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> Any:
        inputs[key_of(options)] = n.detach()
        return n, context, value

    return patch


def middle_patch(adapter: Adapter, blocks: list[Place], tokens: SubjectTokens) -> Callable[..., Tensor]:
    """A middle_patch that applies the adapter after every self-attention, for the whole batch."""
    index = {place.key: number for number, place in enumerate(blocks)}
    return lambda h, options: adapter(index[key_of(options)], h, tokens)


class UNet:
    """A ComfyUI model's UNet as a Network (see ezigen/train.py), called directly, for training."""

    def __init__(self, base: Any, adapter: Adapter | None) -> None:
        """base: a loaded MODEL's .model; only its weights that require gradients take part in a backward pass. adapter:
        None for the UNet alone, which looks at no subject.
        """
        self.unet, self.adapter, self.places = base.diffusion_model, adapter, places(base)
        self.dtype = base.manual_cast_dtype or base.get_dtype()
        sigmas = base.model_sampling.sigmas.detach().double().cpu()
        self.alphas_cumprod = (1 / (1 + sigmas**2)).float()

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        inputs: dict[Key, Tensor] = {}
        self._run(z, timestep, context, {"attn1_patch": [capture(inputs)]})
        return [inputs[place.key] for place in self.places]

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens) -> Tensor:
        patches = [] if self.adapter is None else [middle_patch(self.adapter, self.places, tokens)]
        return self._run(z, timestep, context, {"middle_patch": patches})

    def _run(self, z: Tensor, timestep: Tensor, context: Tensor, patches: dict[str, Any]) -> Tensor:
        options = {"patches": patches, "optimized_attention_override": differentiable_attention}
        z, context = z.to(self.dtype), context.to(self.dtype)
        return self.unet(z, timestep.float(), context=context, transformer_options=options).float()
