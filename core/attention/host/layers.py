"""Attention patches for ComfyUI's UNet that last for one run and wrap whatever other nodes have installed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

Key = tuple[str, int, int]  # part of the UNet, index of the block, index of the transformer layer in the block
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def transformer_layers(unet: Any) -> list[Key]:
    """Keys of the transformer layers of ComfyUI's UNet, as it names them; none for another network."""
    parts = {name: getattr(unet, f"{name}_blocks", None) for name in ("input", "output")}
    if None in parts.values():
        return []
    parts["middle"] = [getattr(unet, "middle_block", None) or []]
    return [
        (name, number, index)
        for name, blocks in parts.items()
        for number, block in enumerate(blocks or [])
        for layer in block
        for index in range(len(getattr(layer, "transformer_blocks", [])))
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """ComfyUI's attention of a layer: q [B, T, heads * d], k and v [B, N, heads * d]."""
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )


@contextlib.contextmanager
def wrapped(extra_args: dict[str, Any], layers: list[Key], **wraps: Callable[[Attention], Any]) -> Iterator[None]:
    """For one run, every layer calls wrap(its previous attention), by kind of patch (attn1, attn2).

    Wrapping the patches that exist when a run starts makes this work with other nodes' patches (IPAdapter, PAG),
    in any connection order. ComfyUI uses a layer's patch if there is one, else its block's. Ours takes the key that is
    already in use, else the block's. So a block patch that another node sets for a single call (PAG's perturbed pass)
    still takes effect, in place of ours.
    """
    options = extra_args["model_options"]["transformer_options"]  # this run's copy
    before = options.get("patches_replace", {})
    patches = dict(before)
    for kind, wrap in wraps.items():
        others = before.get(kind, {})
        places = {key if key in others else key[:2] for key in layers}
        patches[kind] = {**others, **{place: wrap(others.get(place, attend)) for place in places}}
    options["patches_replace"] = patches
    try:
        yield
    finally:
        options["patches_replace"] = before
