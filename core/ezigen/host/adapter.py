"""EZIGen's adapter on a MODEL: subject images encoded by the MODEL itself, and the adapter that reads them.

It is one wrapper on a clone of the MODEL; a run's state goes into that run's options when it starts. So it works with
every sampler and with other nodes' patches, and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
import torch.nn.functional as F
from comfy.model_base import ModelType
from comfy.model_sampling import V_PREDICTION
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...fit.fit import step_generator
from ...prompt.conditioning import Conditioning, single_prompt
from ...prompt.host.entries import entries_by_prompt
from ...session.fingerprint import check_base, fingerprint, network_of_file
from ...session.images import checked_mask
from ...session.sampling import with_options
from ...session.session import predicting
from ...vision.measures import subject_crop
from ..adapter import SUBJECT_TIMESTEP, WEIGHTS, Adapter, Projected, SubjectTokens, batch_tokens
from ..artifact import StoredAdapter, base_sample
from ..staged import layout_steps
from .layers import Key, Place, capture, has_quantised_attention, key_of, places

KEY = "likeness.adapter"
BOTH, PROMPT_ONLY = "both", "positive only"
APPLY_TO = (BOTH, PROMPT_ONLY)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}  # of files
MARGIN = 0.06
CLOSE = 0.05  # relative: a base model in fp16 or bf16 counts as the same
WHITE = 0.9
log = logging.getLogger("likeness")


@dataclass(frozen=True, eq=False)
class Subject:
    """A subject as encoded by one MODEL. images [R, S, S, 3]: the encoded images. base: the MODEL's fingerprint."""

    tokens: SubjectTokens
    images: Tensor
    base: dict[str, str]

    def with_subject(self, other: Subject) -> Subject:
        """This subject's images and another's, for the adapter to read together. ValueError for another model's."""
        if self.base != other.base:
            raise ValueError("The subjects were encoded with different models: encode both with the one you sample.")
        layers = tuple(torch.cat(pair, 1) for pair in zip(self.tokens.layers, other.tokens.layers, strict=True))
        size = max(self.images.shape[1], other.images.shape[1])
        planes = (each.images.movedim(-1, 1) for each in (self, other))
        images = torch.cat([F.interpolate(each, (size, size), mode="bilinear") for each in planes]).movedim(1, -1)
        return Subject(SubjectTokens(layers), images, self.base)


def prepare_images(image: Tensor, mask: Tensor | None, size: int, margin: float) -> Tensor:
    """Subject images as in the adapter's training: alone on white, square -> [R, size, size, 3].

    image [R, H, W, 3 or 4] in 0..1; a fourth channel is alpha. mask [R or 1, H, W]: white where the subject is. An
    empty mask, as Load Image outputs when nothing is painted, counts as none; a mask of the surroundings, as it outputs
    for a transparent image, is turned over. Without alpha and mask the whole image is used, padded with white to a
    square.
    """
    has_mask = mask is not None
    if mask is None or not bool((mask > 0.5).any()):
        mask = image[..., 3] if image.shape[-1] == 4 else None
    image, mask = image[..., :3].float().cpu(), None if mask is None else mask.float().cpu()
    if mask is None:
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        if bool((corners.amin(-1) < WHITE).sum() > len(image)):
            if has_mask:
                raise ValueError(
                    "The mask is empty, and the subject's image has no white background: paint the subject "
                    "(right-click the image, 'Open in MaskEditor'), or disconnect the mask to take the image as it is."
                )
            log.warning(
                "The subject's image has no white background: its surroundings will be taken for a part of the "
                "subject. Connect a mask."
            )
        mask, margin = torch.ones(image.shape[:3]), 0.0
    mask = checked_mask(mask, len(image), (image.shape[1], image.shape[2]), subject=True)
    mask = F.interpolate(mask[:, None], image.shape[1:3], mode="bilinear")[:, 0]
    return subject_crop(image, mask.expand(len(image), -1, -1), size, margin).clamp(0, 1)


def check_model(model: Any) -> list[Place]:
    """The blocks of a MODEL that get the adapter. ValueError when the MODEL cannot use one."""
    blocks, kind = places(model.model), model.model.model_type
    if isinstance(model.get_model_object("model_sampling"), V_PREDICTION):  # possibly set by another node
        kind = ModelType.V_PREDICTION
    if kind != ModelType.EPS:
        raise ValueError(
            f"This model is of the type {kind.name} (SD2.1 at 768 predicts v); the adapter is "
            "trained for models that predict noise: use SD2.1-base (512), or an SD1.x model with an adapter of its own."
        )
    return blocks


def encode_subject(model: Any, vae: Any, positive: Conditioning, images: Tensor, seed: int) -> Subject:
    """Encode images [R, S, S, 3] from prepare_images(); positive: the subject's class, "a dog".

    The model runs with its LoRAs, but without other nodes' patches of its layers.
    """
    blocks, inputs, bare = check_model(model), dict[Key, Tensor](), model.clone()
    single_prompt(positive, "subject's prompt")
    bare.model_options = {"transformer_options": {"patches": {"attn1_patch": [capture(inputs)]}}}
    bare.wrappers, bare.additional_models = {}, {}

    def body(denoiser: Any, x0: Tensor) -> None:
        sigma = denoiser.sigmas[SUBJECT_TIMESTEP].to(x0).view(1)
        noise = torch.randn((1, *x0.shape[1:]), generator=step_generator(seed, 0, "subject")).to(x0)
        denoiser.denoised(denoiser.noised(x0, noise.expand_as(x0), sigma.expand(len(x0))), sigma)

    predicting(bare, positive, vae.encode(images), body)
    tokens = batch_tokens([inputs[place.key].cpu() for place in blocks], [len(images)])
    inputs.clear()  # the MODEL's options hold it
    return Subject(tokens, images.cpu(), fingerprint(model))


def load_patcher(stored: StoredAdapter, blocks: list[Place], dtype: torch.dtype = torch.float32) -> Any:
    """A ModelPatcher of the adapter for a model's blocks. It uses the file's tensors without a copy, or converts them
    if the model computes in a lower precision, to which every step would cast them anyway.
    """
    with torch.device("meta"):
        adapter = Adapter([place.layer for place in blocks]).requires_grad_(False)
    tensors = dict(stored.tensors)
    for name, value in tensors.items():
        if name != WEIGHTS and value.element_size() > dtype.itemsize:
            tensors[name] = value.to(dtype)
    adapter.load(tensors, assign=True)
    return comfy.model_patcher.ModelPatcher(adapter, mm.get_torch_device(), mm.unet_offload_device())


def with_adapter(
    model: Any,
    stored: StoredAdapter,
    subject: Subject,
    ratio: float = 1.0,
    strength: float = 1.0,
    apply_to: str = BOTH,
) -> Any:
    """A clone of the MODEL with the adapter in the last `ratio` of the steps, in place of an earlier one, or without
    any at strength 0. ValueError, before anything runs, when model, adapter and subject do not belong together.
    """
    blocks = check_model(model)
    check_base(subject.base, model, "subject", "encoded with")
    patcher = load_patcher(stored, blocks, model.get_model_object("manual_cast_dtype") or model.model_dtype())
    _warn_of_base(stored, model, blocks)
    clone = without_adapter(model)
    if strength != 0.0:
        clone.set_additional_models(KEY, [patcher])
        injection = _Injection(patcher.model, tuple(blocks), subject.tokens, ratio, strength, apply_to)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, injection)
    return clone


def with_ratio(model: Any, ratio: float) -> Any:
    """A clone of a MODEL from with_adapter(), with the same adapter in another part of the steps."""
    clone = model.clone()
    by_key = clone.wrappers[WrappersMP.SAMPLER_SAMPLE]
    by_key[KEY] = [replace(injection, ratio=ratio) for injection in by_key[KEY]]
    return clone


def without_adapter(model: Any) -> Any:
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    clone.remove_additional_models(KEY)
    return clone


def _warn_of_base(stored: StoredAdapter, model: Any, blocks: list[Place]) -> None:
    if has_quantised_attention(model, blocks):
        return
    state, modules = network_of_file(model), {place.layer.name: place.module for place in blocks}
    for name, row in stored.header.get("base", {}).items():
        layer = name.removesuffix(".attn1.to_q.weight")
        weight, recorded = state[f"{modules[layer]}.attn1.to_q.weight"], torch.tensor(row)
        current = weight.flatten()[: len(row)].float().cpu()
        if float((current - recorded).abs().max()) > CLOSE * float(recorded.abs().max()):
            log.warning("The adapter was trained with another model of this shape: the likeness may suffer.")
            return


@dataclass(frozen=True, eq=False)
class _Injection:
    """The sampling wrapper that applies the adapter after every self-attention for one run."""

    adapter: Adapter
    places: tuple[Place, ...]
    tokens: SubjectTokens
    ratio: float
    strength: float
    apply_to: str

    def __call__(self, executor, guider, sigmas, extra_args, callback, noise, *more, **named) -> Any:
        entries_by_prompt(guider)  # gives each prompt's entries their own ids
        negative = (guider.conds.get("negative") or []) if self.apply_to == PROMPT_ONLY else []
        excluded = frozenset(entry["uuid"] for entry in negative)
        tokens = self.tokens.map(lambda features: features.to(noise.device))
        scheme = guider.model_patcher.get_model_object("model_sampling")
        patch = self._patch(tokens, self._first_level(sigmas, scheme), excluded)
        before = extra_args["model_options"]["transformer_options"].get("patches", {})
        patches = {**before, "middle_patch": [patch, *before.get("middle_patch", [])]}
        extra_args = with_options(extra_args, patches=patches)
        return executor(guider, sigmas, extra_args, callback, noise, *more, **named)

    def _first_level(self, sigmas: Tensor, scheme: Any) -> float:
        """The highest noise level at which the adapter is active: that of a step or, when there are too few steps to
        split (a single one; none in a training or an inversion), that of the same fraction of the timesteps.
        """
        steps = len(sigmas) - 1
        if self.ratio == 1.0:
            return float("inf")
        if layout_steps(steps, self.ratio) == 0:
            return float(scheme.percent_to_sigma(1.0 - self.ratio))
        descending = sigmas.sort(descending=True).values  # SIGMAS may be reversed, for an inversion
        return float(descending[layout_steps(steps, self.ratio)]) * (1 + 1e-5)

    def _patch(self, tokens: SubjectTokens, first_level: float, excluded: Collection[Any]) -> Callable[..., Tensor]:
        """The middle_patch of one sampling. excluded: the ids of the entries that do not see the subject."""
        index = {place.key: number for number, place in enumerate(self.places)}
        projected: dict[tuple[int, torch.dtype], Projected] = {}
        last: list[Any] = [None, False]  # all blocks of a call get the same levels; reading one synchronises a GPU

        def adapted(number: int, h: Tensor) -> Tensor:
            key = number, h.dtype
            if key not in projected:
                with torch.inference_mode(False), torch.no_grad():  # a later step may need a gradient through h
                    projected[key] = self.adapter.project(number, tokens, h)
            return self.adapter(number, h, tokens, self.strength, projected[key])

        def patch(h: Tensor, options: dict[str, Any]) -> Tensor:
            """h [B, T, C] after a self-attention; each chunk of the batch belongs to one prompt."""
            sigmas, number = options["sigmas"], index[key_of(options)]
            if sigmas is not last[0]:
                last[:] = sigmas, float(sigmas.max()) <= first_level
            if not last[1]:
                return h
            skipped = [chunk in excluded for chunk in options.get("uuids") or [None]]
            if not any(skipped):
                return adapted(number, h)
            parts = zip(h.chunk(len(skipped)), skipped, strict=True)
            return torch.cat([part if skip else adapted(number, part) for part, skip in parts])

        return patch


def model_base_sample(model: Any) -> dict[str, list[float]]:
    """The header entry that identifies the model of a training."""
    state = network_of_file(model)
    modules = {place.layer.name: place.module for place in places(model.model)}
    return base_sample(list(modules), lambda name: state[f"{modules[name]}.attn1.to_q.weight"])
