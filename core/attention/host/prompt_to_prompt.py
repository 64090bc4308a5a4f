"""Replace a subject in an image (HiFi Tuner, Alg. 3; prompt-to-prompt's word swap) on a MODEL, with any sampler.

Source and edit are the two rows of one latent batch, and the CONDITIONING's token embeddings have batch size 2 as
well: ComfyUI gives each image its own prompt. Where the positive prompt is evaluated, the edit's attention is corrected
with the source's attention of the same call; nothing is stored and no steps are counted. In ComfyUI's UNet this is a
patch of the cross-attention layers; in transformers it is in ComfyUI's hook for every attention call (joint.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...inversion.rectify import step_at
from ...prompt.conditioning import Conditioning
from ...prompt.host.entries import entries_by_prompt, table_of
from ...prompt.windows import SigmaRange
from ...session.fingerprint import check_base
from ...session.images import checked_mask
from ...session.weights import POST_CFG
from ..maps import mean_over_layers
from ..prompt_to_prompt import (
    BLEND_START,
    SELF_CELLS,
    Swap,
    blend_mask,
    blend_predictions,
    column_map,
    edit_columns,
)
from .joint import Call, looking
from .layers import Attention, transformer_layers, wrapped
from .swapped_prompt import (
    KEY,
    LearnedSubject,
    clip_swap,
    edited_prompt,
    encode_prompts,
    encoder_swaps,
    pair_prompts,
)

CHANGED = "connect the subject's mask, grown a little, or none"


@dataclass(frozen=True)
class SubjectSwap:
    """Replace `word` in a prompt, also with a learned subject. The percents are where control ends, 1 being the
    finished image. blend: a place may change if its attention is above this share of the maximum; 0 allows all places.
    mask, a MASK: where the image may change, 1 in a Control; with blend, where both allow it.
    """

    prompt: str
    word: str
    replacement: str
    subject: LearnedSubject | None = None
    end_percent: float = 1.0
    self_percent: float = 0.0
    renormalise: bool = False
    blend: float = 0.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Control:
    """The attention control of a MODEL, a wrapper of its samplings. prompts: source and edit. swaps: one for each text
    encoder in the prompt. rows: tokens of a prompt, padding included.
    """

    request: SubjectSwap
    prompts: tuple[str, str]
    swaps: tuple[Swap, ...]
    rows: int

    def __call__(self, executor, guider, sigmas, extra_args, callback, noise, *more, **named) -> Any:
        entries = self._prompts(entries_by_prompt(guider), noise)
        layers = transformer_layers(guider.inner_model.diffusion_model)
        for entry in entries:
            _check_rows(self.rows, _rows(entry) if layers else entry["cross_attn"].shape[1])
        run = _Run(self, guider, entries, sigmas.tolist(), noise)
        options = extra_args["model_options"]
        if run.blends:
            options = {**options, POST_CFG: [run.commit, *options.get(POST_CFG, []), run.blend]}
        extra_args = {**extra_args, "model_options": options}
        if self.request.self_percent > 0:
            extra_args = wrapped(extra_args, layers, "attn1", run.self_attention)
        extra_args = looking(extra_args, run.look, guider, entries[0], noise, sigmas[0], run.expected)
        return executor(guider, sigmas, extra_args, callback, noise, *more, **named)

    def _prompts(self, conds: dict[str, list], noise: Tensor) -> list[dict[str, Any]]:
        """The entries of the prompt that belongs to this control, since guiders name and order prompts differently."""
        if noise.shape[0] != 2:
            raise ValueError(
                f"The latent holds {noise.shape[0]} image(s); a model from Replace Subject works on two, the "
                "image and its edit: connect the latent of Replace Subject, and for anything else the model in "
                "front of it."
            )
        marked = [entry for entries in conds.values() for entry in entries if KEY in entry]
        own_prompts = [entry for entry in marked if entry[KEY] == self.prompts]
        if not own_prompts:
            origin = "another Replace Subject's" if marked else "not from Replace Subject"
            raise ValueError(
                f"The positive prompt is {origin}: connect the 'positive' of the Replace Subject that the model comes "
                "from."
            )
        for entry in own_prompts:
            if "area" in entry and self.request.blend > 0:
                raise ValueError(
                    "A prompt, the negative one included, holds in an area, whose maps do not show the whole image: "
                    "take the area off, or give Replace Subject a mask in place of blend."
                )
        return own_prompts


def replace_subject(
    model: Any, clip: Any, request: SubjectSwap, latent: dict[str, Any], source: Conditioning | None = None
) -> tuple[Any, Conditioning]:
    """A clone of the MODEL and the positive prompt for both images. latent: the starting noise. source: the prompt that
    the image was inverted with, whose sizes and ControlNets apply to both.
    """
    learned, prompt, word, mask = request.subject, request.prompt, request.word, request.mask
    if mask is not None:
        rows, columns = latent["samples"].shape[-2:]
        white = checked_mask(mask, 1, (rows, columns), empty=CHANGED, full=CHANGED) > 0.5
        request = replace(request, mask=white.float())
    if learned is not None:
        check_base(learned.embedding.header.get("base", {}), model)
    prompts = (prompt, edited_prompt(prompt, word, request.replacement))
    of_unet = transformer_layers(model.model.diffusion_model)
    if request.self_percent > 0 and not of_unet:
        raise ValueError(
            "self_percent copies the attention of the UNet's layers of at most 32 x 32 places, which this model does "
            "not have: set it to 0."
        )
    swaps = (clip_swap(clip, *prompts, word, learned),) if of_unet else ()
    encoded = encode_prompts(clip, prompts, source)
    swaps = swaps or encoder_swaps(clip, prompts, *encoded, learned)
    positive = pair_prompts(*encoded, learned, prompts)
    return with_control(model, Control(request, prompts, swaps, positive[0][0].shape[1])), positive


def repeat_latent(latent: dict[str, Any]) -> dict[str, Any]:
    """The starting noise, repeated for both images. ValueError unless the latent holds one image."""
    samples = latent["samples"]
    if samples.shape[0] != 1:
        raise ValueError(
            f"The latent holds {samples.shape[0]} images, expected the one noise that Invert Image found: replace "
            "the subject in one image at a time."
        )
    return {**latent, "samples": torch.cat([samples, samples])}


def with_control(model: Any, control: Control) -> Any:
    """A clone of the MODEL with the control; replaces an earlier one."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, control)
    return clone


def _rows(entry: dict[str, Any]) -> int:
    """The number of tokens of a guider's entry; 1 for an entry without token embeddings."""
    table = table_of(entry)
    return 1 if table is None else table.cond.shape[1]


def _check_rows(expected: int, rows: int, longest: int | None = None) -> None:
    """ValueError unless these are the prompt's tokens, or a repetition of them up to the longest prompt's length."""
    if rows % expected or (longest or expected) % rows:
        raise ValueError(
            f"The prompt has {expected} rows, {rows} came: a node behind Replace Subject (Conditioning Concat) or on "
            "the model (a patch of attn2) adds rows of its own. Take it off, or use it without Replace Subject."
        )


class _Run:
    """The state of one sampling: the control's tensors, where both images are in a batch, and the word's attention."""

    def __init__(
        self, control: Control, guider: Any, entries: list[dict[str, Any]], levels: Sequence[float], noise: Tensor
    ) -> None:
        self.how, rows, sampling = control.request, control.rows, guider.inner_model.model_sampling
        tail = self.how.subject.tokens if self.how.subject else 0
        mapping, is_edit = torch.eye(rows), edit_columns(Swap(0, 0, 0), rows, tail)
        self._words: tuple[list[int], list[int]] = [], []  # the places of its tokens in the source and in the edit
        for swap in control.swaps:
            mapping, is_edit = mapping @ column_map(swap, rows), is_edit | edit_columns(swap, rows)
            self._words[0].extend(range(swap.start, swap.start + swap.old))
            self._words[1].extend(range(swap.start, swap.start + swap.new))
        self.mapping, self.is_edit = mapping.to(noise.device), is_edit.to(noise.device)
        self.cross, self.self_ = (
            SigmaRange(float("inf"), sampling.percent_to_sigma(end))
            for end in (self.how.end_percent, self.how.self_percent)
        )
        self._uuids = frozenset(entry["uuid"] for entry in entries)
        self._levels, self._size = levels, (noise.shape[-2], noise.shape[-1])
        self._blend_from = sampling.percent_to_sigma(BLEND_START)
        lengths = [_rows(entry) for entries in guider.conds.values() for entry in entries or []]
        self._longest = math.lcm(control.rows, *lengths)  # ComfyUI repeats prompts of different lengths up to this
        self._attention, self._pending = torch.zeros(2, *self._size), torch.zeros(2, *self._size)
        self.blends = self.how.blend > 0 or self.how.mask is not None
        self.records = self.how.blend > 0 and bool(control.swaps)

    def pairs(self, batch: int, options: dict[str, Any]) -> Iterator[slice]:
        """The batch slices in which source and edit are evaluated with the positive prompt."""
        chunks = options.get("uuids", ())
        for index, chunk in enumerate(chunks):
            if chunk not in self._uuids:
                continue
            if batch != 2 * len(chunks):
                raise ValueError(
                    f"{batch} rows came for {len(chunks)} prompts, Replace Subject needs the image and its edit in "
                    "one call: take off the node that splits the batch or multiplies its rows (context windows, "
                    "regional attention)."
                )
            yield slice(2 * index, 2 * index + 2)

    def record(self, maps: Tensor) -> None:
        """Add a layer's attention [2, tokens, h, w] of source and edit to the prompt: that to the word."""
        means = torch.stack([each[word].mean(0) for each, word in zip(maps, self._words, strict=True)])
        self._pending = self._pending.to(means) + mean_over_layers([means[None]], self._size)[0]

    def commit(self, args: dict[str, Any]) -> Tensor:
        """Called first after CFG: accept the attention recorded so far. Evaluations by other nodes after CFG, such as
        PAG's perturbed pass, are discarded."""
        self._attention = self._attention.to(self._pending) + self._pending
        return args["denoised"]

    def blend(self, args: dict[str, Any]) -> Tensor:
        """Called last after CFG: the prediction that keeps the edit equal to the source away from the word."""
        self._pending = torch.zeros_like(self._pending)
        sigma = float(args["sigma"].max())
        step, mask = step_at(sigma, self._levels), None  # [1, h, w], None for everywhere
        if self.how.mask is not None:
            mask = torch.nn.functional.adaptive_max_pool2d(self.how.mask, self._size) > 0
        if self.records and sigma <= self._blend_from:
            allowed = blend_mask(self._attention, self.how.blend)
            mask = allowed if mask is None else allowed & mask.to(allowed.device)
        if step is None or mask is None:
            return args["denoised"]
        return blend_predictions(args["input"], args["denoised"], sigma, self._levels[step + 1], mask)

    def look(self, call: Call, out: Tensor) -> Tensor:
        """A layer in which the image looks at the prompt, under control."""
        controls = self.cross.holds(float(call.options["sigmas"].max()))
        for pair in self.pairs(len(call.q), call.options) if controls or self.records else ():
            _check_rows(len(self.is_edit), call.tokens, self._longest)
            if self.records:
                self.record(call.maps(pair))
            if controls:
                out = call.corrected(out, pair, self.mapping, self.is_edit, self.how.renormalise)
        return out

    def expected(self, options: dict[str, Any]) -> bool:
        """Whether the prompt is evaluated, at a level with control."""
        active = self.records or self.cross.holds(float(options["sigmas"].max()))
        return active and not self._uuids.isdisjoint(options.get("uuids", ()))

    def self_attention(self, inner: Attention) -> Attention:
        """A self-attention layer: the edit uses the source's attention with its own values (prompt-to-prompt)."""

        def layer(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            if q.shape[1] <= SELF_CELLS and self.self_.holds(float(options["sigmas"].max())):
                for pair in self.pairs(q.shape[0], options):
                    last = torch.tensor([pair.stop - 1], device=q.device)
                    q, k = (each.index_copy(0, last, each[pair.start :][:1]) for each in (q, k))
            return inner(q, k, v, options)

        return layer
