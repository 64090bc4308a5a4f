"""Attention in transformers, seen through ComfyUI's hook for every attention call.

Image and text attend in one layer (FLUX, Qwen-Image, SD3.5), or in layers of their own (Wan, Cosmos). Which queries are
the image's and which keys the prompt's is asked of the model: it predicts for three latents, the second with another
prompt and the third with another image, up to the first layer in which the image looks at the prompt. No layer needs a
name afterwards: such a call is known by its lengths.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...session.sampling import with_options
from ..maps import column_probabilities
from ..prompt_to_prompt import joint_correction
from .layers import LayerCall, transformer_layers, wrapped

OVERRIDE = "optimized_attention_override"  # ComfyUI's name of the hook
CHANGED = 1e-2  # relative: a token differs that differs by more
KEY = "likeness.joint"


@dataclass(frozen=True)
class Layout:
    """A call in which the image looks at the prompt. lengths: of queries and of keys. image: its queries, in the order
    of `shape`; text: the keys of the prompt's tokens.
    """

    lengths: tuple[int, int]
    image: slice
    text: slice
    shape: tuple[int, int]


class Call:
    """One attention call. q, k, v [B, heads, N, d]; options: ComfyUI's transformer_options."""

    layout: Layout  # known to look(), as the number of the prompt's tokens
    tokens: int

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, *more: Any, **named: Any) -> None:
        self.q, self.k, self.v = q, k, v
        if not named.get("skip_reshape"):  # heads lie side by side
            size = q.flatten(2).shape[-1] // heads
            self.q, self.k, self.v = (x.flatten(2).unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k, v))
        self._split_out, self.heads, self.scale = bool(named.get("skip_output_reshape")), heads, named.get("scale")
        self.options: dict[str, Any] = named.get("transformer_options") or {}
        self._mask = named.get("mask", more[0] if more else None)
        self.lengths = self.q.shape[2], self.k.shape[2]

    def probabilities(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """From these rows' image to the prompt's tokens, see column_probabilities()."""
        image, mask = self.layout.image, self._mask
        if mask is not None:  # as what is added to the scores, [B, heads, T, N] or 1 of them
            mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim != 3 else mask[:, None]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
            mask = mask[rows if len(mask) > 1 else slice(None), :, image if mask.shape[2] > 1 else slice(None)]
        q, k = self.q[rows, :, image], self._for_each_query(self.k[rows])
        return column_probabilities(q, k, self.layout.text, mask, self.scale)

    def maps(self, rows: slice, tokens: slice = slice(None)) -> Tensor:
        """Those of some tokens as maps [B, tokens, h, w], the mean over heads."""
        attention = torch.cat([part.mean(1) for _, part in self.probabilities(rows)], 1)
        return attention.transpose(1, 2)[:, tokens].unflatten(-1, self.layout.shape)

    def corrected(self, out: Tensor, pair: slice, mapping: Tensor, is_edit: Tensor, renormalise: bool) -> Tensor:
        """A copy of the output with prompt-to-prompt's control in the last of two rows, see joint_correction()."""
        out = out.clone()
        by_head = out if self._split_out else out.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        values = self._for_each_query(self.v[pair][1:])[0, :, self.layout.text]
        edit = by_head[pair.stop - 1, :, self.layout.image]
        joint_correction(self.probabilities(pair), edit, values, mapping, is_edit, renormalise)
        return out

    def _for_each_query(self, keys: Tensor) -> Tensor:
        """Keys or values [B, heads, N, d], of models that have one for several queries too."""
        return keys if keys.shape[1] == self.heads else keys.repeat_interleave(self.heads // keys.shape[1], 1)


def looking(
    extra_args: dict[str, Any],
    look: Callable[[Any, Tensor], Tensor],
    guider: Any,
    entry: dict[str, Any],
    x: Tensor,
    sigma: Tensor,
    expected: Callable[[dict[str, Any]], bool] = lambda _options: True,
) -> dict[str, Any]:
    """A run's arguments with which every call in which the image looks at the prompt goes through look(), around other
    nodes' hooks. look: from a Call, or a LayerCall of a UNet, and its output to the output. entry: a prompt of the
    running guider; x, sigma: latents like the run's.

    RuntimeError when there is no such call in an evaluation for which expected(transformer_options) holds.
    """
    layers = transformer_layers(guider.inner_model.diffusion_model)
    if layers:
        return wrapped(extra_args, layers, "attn2", lambda inner: lambda *layer: look(LayerCall(*layer), inner(*layer)))
    layout = find_layout(guider, entry, x, sigma)
    options = extra_args["model_options"]["transformer_options"]
    before, wrappers, seen = options.get(OVERRIDE), options.get("wrappers", {}), [0]

    def hook(function: Any, *args: Any, **named: Any) -> Tensor:
        out = function(*args, **named) if before is None else before(function, *args, **named)
        call = Call(*args, **named)
        if call.lengths != layout.lengths:
            return out
        seen[0] += 1
        call.layout, call.tokens = layout, layout.text.stop - layout.text.start
        return look(call, out)

    def checked(executor: Any, *args: Any, **named: Any) -> Any:
        count, to = seen[0], named.get("transformer_options") or args[5]
        result = executor(*args, **named)
        if seen[0] == count and expected(to):
            raise RuntimeError(
                "The attention to this prompt is not seen: a node on the model cuts the image or the prompt (areas, "
                "context windows) or takes attention away from ComfyUI (a compiled model). Take it off."
            )
        return result

    of_apply = wrappers.get(WrappersMP.APPLY_MODEL, {})
    wrappers = {**wrappers, WrappersMP.APPLY_MODEL: {**of_apply, KEY: [checked]}}
    return with_options(extra_args, **{"wrappers": wrappers, OVERRIDE: hook})


class _Done(Exception):
    """The layout is known; the rest of the prediction is not needed."""


def find_layout(guider: Any, entry: dict[str, Any], x: Tensor, sigma: Tensor) -> Layout:
    """Asked of a running guider's model with one of its prompts, for latents like x. ValueError when it is not told."""
    rows = entry["cross_attn"][:1].to(x)
    generator = torch.Generator().manual_seed(0)
    other, one, another = (torch.randn(each.shape, generator=generator).to(x) for each in (rows, x[:1], x[:1]))
    three = torch.cat([one, one, another]) * sigma.to(x)
    left_out = {"area", "mask", "control", "timestep_start", "timestep_end"}
    prompt = {n: v[:1] if isinstance(v, Tensor) else v for n, v in entry.items() if n not in left_out}
    prompt["cross_attn"] = torch.cat([rows, other * rows.std(), rows])
    model, tokens, (height, width) = guider.inner_model, rows.shape[1], x.shape[-2:]
    start: int | None = None  # where the prompt's tokens begin, in the first layer that has them
    cells, layout = 0, None  # the image's tokens

    def probe(function: Any, *args: Any, **named: Any) -> Tensor:
        nonlocal start, cells, layout
        call = Call(*args, **named)
        text, image = (_changed(call.k, 1), _changed(call.q, 2)) if len(call.q) == 3 else ((), ())
        if len(image) and not cells:
            cells = _count(image)
        if len(text):
            before = 0 if start is None else int(text[0])  # of all text, in a layer of text and image
            if start is None:
                start = int(text[0])
                if _count(text) != tokens:
                    raise _Done
            if len(image):
                first, behind = int(image[0]), before + start
                grids = ((-(-height // patch), -(-width // patch)) for patch in range(1, 1 + max(height, width)))
                shape = next((grid for grid in grids if grid[0] * grid[1] == cells), None)
                places = slice(first, first + cells), slice(behind, behind + tokens)
                layout = None if shape is None else Layout(call.lengths, *places, shape)
                raise _Done
        return function(*args, **named)

    if all(value.ndim > 1 for value in prompt.values() if isinstance(value, Tensor)):  # else not one for each latent
        entries = comfy.samplers.encode_model_conds(
            model.extra_conds, [prompt], three, x.device, "positive", latent_image=torch.zeros_like(three)
        )
        with contextlib.suppress(_Done):
            options = {"transformer_options": {OVERRIDE: probe}}
            comfy.samplers.calc_cond_batch(model, [entries], three, sigma.to(x).expand(3), options)
    if layout is None:
        raise ValueError(
            f"This model is a {type(model.diffusion_model).__name__}, whose layers do not show what of the image looks "
            "at which token of the prompt (they mix the tokens first, or hide their attention from ComfyUI's hook): "
            "connect one that does, such as SDXL, FLUX or Qwen-Image."
        )
    return layout


def _changed(tokens: Tensor, other: int) -> Tensor:
    """The places at which tokens [B, heads, N, d] differ from the first row's."""
    first = tokens[0].float()
    difference = (tokens[other].float() - first).norm(dim=(0, 2))
    return (difference > CHANGED * first.norm(dim=(0, 2))).nonzero()[:, 0]


def _count(places: Tensor) -> int:
    """How many they are, 0 if they are not side by side."""
    return len(places) if int(places[-1] - places[0]) + 1 == len(places) else 0
