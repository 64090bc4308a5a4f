"""Replacing a subject in an image (HiFi Tuner, Alg. 3; prompt-to-prompt's word swap) on a MODEL, for any sampler.

Source and edit are the two rows of one latent batch, with a CONDITIONING whose tables have two rows as well: ComfyUI
gives each image its own. Where the positive prompt is evaluated, the edit's attention is corrected by the source's of
the same call; nothing is stored, and nothing is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...inversion.rectify import step_at
from ...prompt.conditioning import Conditioning
from ...prompt.host.entries import entries_by_prompt, table_of
from ...prompt.windows import SigmaRange
from ...session.fingerprint import check_base
from ...session.weights import POST_CFG
from ..maps import mean_over_layers, probabilities, row_maps
from ..prompt_to_prompt import (
    BLEND_START,
    SELF_CELLS,
    Swap,
    blend_mask,
    blended,
    column_map,
    correction,
    own_columns,
    word_swap,
)
from .layers import Attention, attention_layers, replaced
from .swapped_prompt import KEY, ROOM, Learned, edited_prompt, encoded, paired, shortened, tokens_of


@dataclass(frozen=True)
class Control:
    """What a MODEL is told. prompts: source and edit. The percents say until when: 1 is the finished image. blend:
    the share of the most attention from which on a place may change; 0 lets all of them. mask [1, 1, H, W]: where the
    image may change; with both, where both allow it.
    """

    prompts: tuple[str, str]
    swap: Swap
    rows: int
    tail: int = 0
    end_percent: float = 1.0
    self_percent: float = 0.0
    renormalise: bool = False
    blend: float = 0.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class SubjectSwap:
    """The word of a prompt that another takes the place of, or a learned subject. The rest as in Control."""

    prompt: str
    word: str
    new: str
    learned: Learned | None = None
    end_percent: float = 1.0
    self_percent: float = 0.0
    renormalise: bool = False
    blend: float = 0.0
    mask: Tensor | None = None

    def control(self, swap: Swap, edited: str, rows: int) -> Control:
        """What the MODEL is told, once the prompts are known."""
        tail = self.learned.tokens if self.learned else 0
        ends = (self.end_percent, self.self_percent)
        return Control((self.prompt, edited), swap, rows, tail, *ends, self.renormalise, self.blend, _usable(self.mask))


def replaced_subject(
    model: Any, clip: Any, wanted: SubjectSwap, source: Conditioning | None = None
) -> tuple[Any, Conditioning]:
    """A clone of the MODEL and the positive prompt for both images. ValueError before anything runs.

    source: the prompt as it was inverted with; sizes and ControlNets on it hold for both.
    """
    attention_layers(model.model.diffusion_model)
    if clip is None:
        raise ValueError(
            "The CLIP is empty: this checkpoint holds no text encoder. Connect the one that belongs to the model, from "
            "a Load CLIP node."
        )
    learned, prompt, word = wanted.learned, wanted.prompt, wanted.word
    if learned is not None:
        check_base(learned.embedding.header.get("base", {}), model)
    edited = edited_prompt(prompt, word, wanted.new)
    of_source, of_edit, of_word = (tokens_of(clip, text) for text in (prompt, edited, word.strip()))
    try:
        swap = word_swap(of_source, of_edit, of_word)
    except ValueError as error:
        raise ValueError(
            f"'{word}' is no token sequence of its own in '{shortened(prompt)}' ({error}): put spaces around it, and "
            "give weights such as (word:1.2) to the whole word."
        ) from error
    tail = learned.tokens if learned else 0
    if tail > ROOM - len(of_edit):
        raise ValueError(
            f"The embedding takes the last {tail} rows of the prompt, but '{shortened(edited)}' leaves only "
            f"{ROOM - len(of_edit)} unused: shorten the prompt by {tail - ROOM + len(of_edit)} tokens."
        )
    positive = paired(*encoded(clip, (prompt, edited), source), learned, (prompt, edited))
    rows = positive[0][0].shape[1]
    return with_control(model, wanted.control(swap, edited, rows)), positive


def _usable(mask: Tensor | None) -> Tensor | None:
    """A MASK [H, W] or [1, H, W] as [1, 1, H, W]; ValueError for several, an empty or a full one."""
    if mask is None:
        return None
    inside = (mask > 0.5).float().reshape(-1, 1, *mask.shape[-2:])
    if len(inside) != 1 or not 0 < float(inside.mean()) < 1:
        found = f"{len(inside)} masks" if len(inside) != 1 else "an empty mask" if not inside.any() else "a full mask"
        raise ValueError(
            f"There is {found}, expected one that is white where the image may change and black elsewhere: connect "
            "the subject's mask, grown a little, or none."
        )
    return inside


def twice(latent: dict[str, Any]) -> dict[str, Any]:
    """The starting noise for both images. ValueError unless it is one."""
    samples = latent["samples"]
    if samples.shape[0] != 1:
        raise ValueError(
            f"The latent holds {samples.shape[0]} images, expected the one noise that Invert Image found: replace "
            "the subject in one image at a time."
        )
    return {**latent, "samples": torch.cat([samples, samples])}


def with_control(model: Any, control: Control) -> Any:
    """A clone of the MODEL that is controlled; a control that is already on it is replaced."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _Sampling(control))
    return clone


@dataclass(frozen=True)
class _Sampling:
    """The wrapper of a whole sampling."""

    control: Control

    def __call__(
        self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *more
    ) -> Any:
        ours = self._ours(entries_by_prompt(guider), noise)
        lengths = [_rows(entry) for entries in guider.conds.values() for entry in entries or []]
        run = _Run(self.control, ours, lengths, guider.inner_model.model_sampling, sigmas.tolist(), noise)
        own = extra_args["model_options"]  # a copy of this run's own
        options = own["transformer_options"]
        before, after_cfg = options.get("patches_replace", {}), own.get(POST_CFG, [])
        layers = attention_layers(guider.inner_model.diffusion_model)
        patches = replaced(before, "attn2", layers, lambda inner: _Cross(run, inner))
        if self.control.self_percent > 0:
            patches = replaced(patches, "attn1", layers, lambda inner: _Self(run, inner))
        options["patches_replace"] = patches
        if run.blends:
            own[POST_CFG] = [run.counted, *after_cfg, run.blended]
        try:
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *more)
        finally:
            options["patches_replace"], own[POST_CFG] = before, after_cfg

    def _ours(self, conds: dict[str, list], noise: Tensor) -> frozenset[Any]:
        """The uuids of the prompt that belongs to this control; guiders have different names and orders."""
        if noise.shape[0] != 2:
            raise ValueError(
                f"The latent holds {noise.shape[0]} image(s); a model from Replace Subject works on two, the "
                "image and its edit: connect the latent of Replace Subject, and for anything else the model in "
                "front of it."
            )
        marked = [entry for entries in conds.values() for entry in entries if KEY in entry]
        ours = [entry for entry in marked if entry[KEY] == self.control.prompts]
        if not ours:
            found = "another Replace Subject's" if marked else "not from Replace Subject"
            raise ValueError(
                f"The positive prompt is {found}: connect the 'positive' of the Replace Subject that the model comes "
                "from."
            )
        for entry in ours:
            _check_rows(self.control.rows, _rows(entry))
            if "area" in entry and self.control.blend > 0:
                raise ValueError(
                    "A prompt, the negative one included, holds in an area, whose maps do not show the whole image: "
                    "take the area off, or give Replace Subject a mask in place of blend."
                )
        return frozenset(entry["uuid"] for entry in ours)


def _rows(entry: dict[str, Any]) -> int:
    """How many rows the table of an entry of a guider has; 1 for one without a table."""
    table = table_of(entry)
    return 1 if table is None else table.cond.shape[1]


def _check_rows(expected: int, rows: int, longest: int | None = None) -> None:
    """ValueError when these are not the rows of the prompt, or their repetition up to what all prompts fit into."""
    if rows % expected or (longest or expected) % rows:
        raise ValueError(
            f"The prompt has {expected} rows, {rows} came: a node behind Replace Subject (Conditioning Concat) or on "
            "the model (a patch of attn2) adds rows of its own. Take it off, or use it without Replace Subject."
        )


class _Run:
    """One sampling: the control's numbers, where both images stand in a batch, and where the word was looked at."""

    def __init__(
        self,
        control: Control,
        ours: frozenset[Any],
        lengths: Sequence[int],
        sampling: Any,
        levels: Sequence[float],
        noise: Tensor,
    ) -> None:
        self.control = control
        self.mapped = column_map(control.swap, control.rows).to(noise.device)
        self.own = own_columns(control.swap, control.rows, control.tail).to(noise.device)
        self.cross, self.self_ = (
            SigmaRange(float("inf"), sampling.percent_to_sigma(end))
            for end in (control.end_percent, control.self_percent)
        )
        self._ours, self._levels, self._size = ours, levels, (noise.shape[-2], noise.shape[-1])
        self._blend_from = sampling.percent_to_sigma(BLEND_START)
        self._longest = math.lcm(*lengths)  # ComfyUI repeats prompts of different lengths in one call up to this
        self._looked, self._looking = torch.zeros(2, *self._size), torch.zeros(2, *self._size)
        self.blends = control.blend > 0 or control.mask is not None
        self.looks = control.blend > 0

    def pairs(self, batch: int, options: dict[str, Any]) -> Iterator[slice]:
        """Where source and edit are evaluated with the positive prompt."""
        chunks = options.get("uuids", ())
        for index, chunk in enumerate(chunks):
            if chunk not in self._ours:
                continue
            if batch != 2 * len(chunks):
                raise ValueError(
                    f"{batch} rows came for {len(chunks)} prompts, Replace Subject needs the image and its edit in "
                    "one call: take off the node that splits the batch or multiplies its rows (context windows, "
                    "regional attention)."
                )
            yield slice(2 * index, 2 * index + 2)

    def look(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> None:
        """Note how much the word is looked at: q and k [2, T or N, heads * d] of source and edit."""
        swap = self.control.swap
        maps = row_maps(probabilities(q, k, options["n_heads"]), tuple(options["activations_shape"][-2:]))
        of_word = [maps[0, swap.start : swap.start + swap.old], maps[1, swap.start : swap.start + swap.new]]
        seen = torch.stack([each.mean(0) for each in of_word])
        self._looking = self._looking.to(seen) + mean_over_layers([seen[None]], self._size)[0]

    def counted(self, args: dict[str, Any]) -> Tensor:
        """Called first after CFG: what was noted up to here counts. What other nodes evaluate after CFG, such as PAG's
        perturbed pass, does not."""
        self._looked = self._looked.to(self._looking) + self._looking
        return args["denoised"]

    def blended(self, args: dict[str, Any]) -> Tensor:
        """Called last after CFG: the prediction that leaves the edit as the source is, away from the word."""
        self._looking = torch.zeros_like(self._looking)
        sigma = float(args["sigma"].max())
        step, mask = step_at(sigma, self._levels), self._may_change(sigma)
        if step is None or mask is None:
            return args["denoised"]
        return blended(args["input"], args["denoised"], sigma, self._levels[step + 1], mask)

    def _may_change(self, sigma: float) -> Tensor | None:
        """The places [1, h, w] that the mask and the word's attention leave to the edit at this level; None for all."""
        mask = self.control.mask
        allowed = None if mask is None else torch.nn.functional.adaptive_max_pool2d(mask, self._size)[0] > 0
        if not self.looks or sigma > self._blend_from:
            return allowed
        looked = blend_mask(self._looked, self.control.blend)
        return looked if allowed is None else looked & allowed.to(looked.device)

    def check_rows(self, rows: int) -> None:
        """ValueError when the keys are not those of the prompt."""
        _check_rows(len(self.own), rows, self._longest)


@dataclass(frozen=True)
class _Cross:
    """A cross-attention layer of a run."""

    run: _Run
    inner: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        found = self.inner(q, k, v, options)
        run, control = self.run, self.run.control
        controls = run.cross.holds(float(options["sigmas"].max()))
        for pair in run.pairs(q.shape[0], options) if controls or run.looks else ():
            run.check_rows(k.shape[1])
            if run.looks:
                run.look(q[pair], k[pair], options)
            if controls:
                heads = options["n_heads"]
                change = correction(q[pair], k[pair], v[pair], heads, run.mapped, run.own, control.renormalise)
                found = found.clone()
                found[pair.stop - 1] += change.to(found)
        return found


@dataclass(frozen=True)
class _Self:
    """A self-attention layer: the edit looks where the source looks, at its own values (prompt-to-prompt)."""

    run: _Run
    inner: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        if q.shape[1] <= SELF_CELLS and self.run.self_.holds(float(options["sigmas"].max())):
            for pair in self.run.pairs(q.shape[0], options):
                q, k = (each.index_copy(0, _last(pair, each), each[pair.start :][:1]) for each in (q, k))
        return self.inner(q, k, v, options)


def _last(pair: slice, like: Tensor) -> Tensor:
    return torch.tensor([pair.stop - 1], device=like.device)
