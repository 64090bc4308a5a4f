"""Taking part in the attention of ComfyUI's UNet for one run, around whatever other nodes have put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

Key = tuple[str, int, int]  # part of the UNet, number of its block, number of the transformer layer in it
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def attention_layers(unet: Any) -> list[Key]:
    """All transformer layers, as ComfyUI names them. ValueError for a network that is not ComfyUI's UNet."""
    parts = {name: getattr(unet, f"{name}_blocks", None) for name in ("input", "output")}
    if None in parts.values():
        raise ValueError(
            f"This model is a {type(unet).__name__}; prompts are looked at in layers of their own (cross-attention) in "
            "the UNet of SD1.x, SD2.x and SDXL only: connect one of these."
        )
    parts["middle"] = [getattr(unet, "middle_block", None) or []]
    return [
        (name, number, index)
        for name, blocks in parts.items()
        for number, block in enumerate(blocks or [])
        for layer in block
        for index in range(len(getattr(layer, "transformer_blocks", [])))
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """A layer's own attention: q [B, T, heads * d], k and v [B, N, heads * d]."""
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )


def replaced(
    patches: dict[str, Any], kind: Literal["attn1", "attn2"], layers: list[Key], around: Callable[[Attention], Any]
) -> dict[str, Any]:
    """A copy of transformer_options["patches_replace"] where every layer has around(what it would have done).

    Standing around what is there at the beginning of a run works beside other nodes' patches (IPAdapter, PAG), in
    whichever order they were connected. ComfyUI takes a layer's own patch, else its block's; we take the place that is
    taken already, else the block's. So a block's patch that comes for one call (PAG's perturbed pass) holds as without
    us, in place of ours.
    """
    before = patches.get(kind, {})
    places = {key if key in before else key[:2] for key in layers}
    ours = {place: around(before.get(place, attend)) for place in places}
    return {**patches, kind: {**before, **ours}}
