"""Attention patches for ComfyUI's UNet that last for one run and wrap whatever other nodes have installed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...session.sampling import with_options
from ..maps import probabilities, token_maps
from ..prompt_to_prompt import correction

Key = tuple[str, int, int]  # part of the UNet, index of the block, index of the transformer layer in the block
PARTS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}
Attention = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def transformer_layers(unet: Any) -> dict[Key, str]:
    """The transformer layers of ComfyUI's UNet, by its names of them, as paths of modules; none in another network."""
    layers: dict[Key, str] = {}
    for path, _ in getattr(unet, "_orig_mod", unet).named_modules():  # a compiled network has the other's paths
        part, *_, owner, index = words if len(words := path.split(".")) > 2 else ("", "", "")
        if part in PARTS and owner == "transformer_blocks":
            layers[PARTS[part], 0 if part == "middle_block" else int(words[1]), int(index)] = path
    return layers


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """ComfyUI's attention of a layer: q [B, T, heads * d], k and v [B, N, heads * d]."""
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
    )


@dataclass(frozen=True)
class LayerCall:
    """One call of a cross-attention layer, as joint.Call. q [B, T, heads * d], k and v [B, N, heads * d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def maps(self, rows: slice, tokens: slice = slice(None)) -> Tensor:
        attention = probabilities(self.q[rows], self.k[rows], self.options["n_heads"])[..., tokens]
        return token_maps(attention, tuple(self.options["activations_shape"][-2:]))

    def corrected(self, out: Tensor, pair: slice, mapping: Tensor, is_edit: Tensor, renormalise: bool) -> Tensor:
        q, k, v = (each[pair] for each in (self.q, self.k, self.v))
        change = correction(q, k, v, self.options["n_heads"], mapping, is_edit, renormalise)
        out = out.clone()
        out[pair.stop - 1] += change.to(out)
        return out


def wrapped(extra_args: dict[str, Any], layers: Iterable[Key], kind: str, wrap: Callable[[Attention], Any]) -> Any:
    """A run's arguments with which every layer of a kind (attn1, attn2) calls wrap(its previous attention).

    Wrapping the patches that exist when a run starts makes this work with other nodes' patches (IPAdapter, PAG),
    in any connection order. ComfyUI uses a layer's patch if there is one, else its block's. Ours takes the key that is
    already in use, else the block's. So a block patch that another node sets for a single call (PAG's perturbed pass)
    still takes effect, in place of ours.
    """
    before = extra_args["model_options"]["transformer_options"].get("patches_replace", {})
    others = before.get(kind, {})
    places = {key if key in others else key[:2] for key in layers}
    patches = {**others, **{place: wrap(others.get(place, attend)) for place in places}}
    return with_options(extra_args, patches_replace={**before, kind: patches})
