"""The gradient session: every optimization of the pack runs inside a sampler called by a guider.

ComfyUI itself loads the model and everything attached to it, processes the conditioning, runs hooks and wrappers, and
cleans up. Inside the session, the model is differentiable and wrapped as a Denoiser. Interrupts propagate unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import comfy.model_management as mm
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..lora.host.apply import RANK_MASK
from ..prompt.conditioning import Conditioning, detached
from . import sampling
from .checkpointing import checkpointed
from .memory import BYTES_PER_WEIGHT, activations, check_room, explain_out_of_memory, size_on
from .reuse import check_reuse
from .weights import (
    calls,
    check_fully_loaded,
    drop_guidance,
    gradients,
    load_fully,
    out_of_place,
    private_skips,
    replaced,
    thawed,
    trainable_clone,
)

T = TypeVar("T")
COMPANIONS = "likeness.beside"  # key of the session's other models among the clone's additional models
BOXES = "likeness.boxes"  # transformer_options: [B, 4] in latent cells, one box per sample of a training batch


class GuiderDenoiser:
    """A Denoiser backed by a running guider, for one of the guider's prompts. x0: the latent of the run."""

    def __init__(self, guider: Any, extra_args: dict[str, Any], x0: Tensor) -> None:
        self._guider, self._extra_args, self._x0, self._role = guider, extra_args, x0, "positive"
        self.leaves: dict[str, nn.Parameter] = {}  # the weights that a Session trains, by name
        self.before: dict[str, Tensor] = {}  # what they were
        self.called: set[int] = set()  # ids of the modules that run in a prediction, known in a Session
        self.attached = contextlib.ExitStack()  # closed at the end of a Session: what a fit changes of the model
        self._sampling = guider.inner_model.model_sampling
        self._as_noise = not sampling.objective(self._sampling)
        self.sigmas: Tensor = self._sampling.sigmas.detach().float().clone()

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self._sampling.noise_scaling(sigma.view(-1, *[1] * (x0.ndim - 1)), noise, x0)

    def output_scale(self, sigma: Tensor) -> Tensor:
        return sigma if self._as_noise else sampling.output_scale(self._sampling, sigma)

    def denoised(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """As in Denoiser; context and pooled default to the prompt's own token embeddings and vector."""
        mm.throw_exception_if_processing_interrupted()
        extra_args = self._extra_args
        if boxes is not None:
            extra_args = sampling.with_options(extra_args, **{BOXES: boxes.to(x.device)})
        texts = {"cross_attn": context, "pooled_output": pooled}
        changed = {name: value.to(x.device) for name, value in texts.items() if value is not None}
        guider, entries = self._guider, self._guider.conds[self._role]
        if changed:  # prepared as for a sampling: some models pad or number tokens, or send them through own layers
            prompt, prepare = [{**entries[0], **changed}], guider.inner_model.extra_conds
            entries = comfy.samplers.encode_model_conds(
                prepare, prompt, x.detach(), x.device, self._role, latent_image=self._x0
            )
        with replaced(guider, conds={"positive": entries}):
            return guider(x, sigma.expand(x.shape[0]), **extra_args)

    def of(self, role: str) -> GuiderDenoiser:
        """The same model's predictions for another of the guider's prompts, with everything attached to that prompt."""
        other = copy.copy(self)
        other._role = role
        return other

    @property
    def model(self) -> nn.Module:
        return self._guider.inner_model

    @property
    def context(self) -> Tensor:
        """The prompt's token embeddings as its text encoder made them, [1, tokens, width]."""
        return self._guider.conds[self._role][0]["cross_attn"]


def _run(guider: Any, latent: Tensor, body: Callable[[Any, dict[str, Any], Tensor], T]) -> T:
    """Run body(guider, extra_args, x0) as a guider's sampler, and return what it returns; nothing is sampled."""
    results: list[T] = []

    def sample(model_wrap, sigmas, extra_args, callback, noise, latent_image: Any = None, *_more, **_named) -> Any:
        results.append(body(model_wrap, extra_args, latent_image))
        return latent_image

    sampler = comfy.samplers.Sampler()
    sampler.sample = sample
    highest = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)  # valid for any sampler
    guider.sample(torch.zeros_like(latent), latent, sampler, torch.tensor([highest, 0.0]), disable_pbar=True)
    return results[0]


def predicting(model: Any, positive: Conditioning, latent: Tensor, body: Callable[[GuiderDenoiser, Tensor], T]) -> T:
    """What body(denoiser, x0) returns, with a MODEL's own predictions for one prompt, without guidance or gradients.

    Arguments as in Session; the model may be partly offloaded.
    """
    clone = model.clone()
    drop_guidance(clone)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": positive})

    def run(running: Any, extra_args: dict[str, Any], x0: Tensor) -> T:
        denoiser = GuiderDenoiser(running, extra_args, x0)
        check_reuse(clone, denoiser, x0[:1])
        return body(denoiser, x0)

    return _run(guider, latent, run)


@dataclass(frozen=True)
class Session:
    """Gradients through a MODEL for the duration of run().

    model: a ModelPatcher; it is not changed, and its output afterwards is bit-identical. positive: one prompt. latent
    [B, C, h, w] as in a LATENT. negative: another prompt, for denoiser.of("negative"). text: the ModelPatcher of a text
    encoder that also runs. others: further ModelPatchers (a VAE, vision models) that need gradients to their inputs;
    more_memory: bytes they need for that. exact: an fp16 model computes in float32 instead of bf16, for results that
    must match an fp16 sampling. prompts: further ones, for denoiser.of(their name). all_weights: every weight of the
    diffusion model (and of the text encoder) becomes a float32 leaf during the session, in denoiser.leaves. learned:
    the number of the prompt's last tokens that are trained, each of which must have an effect.
    """

    model: Any
    positive: Conditioning
    latent: Tensor
    negative: Conditioning | None = None
    checkpointing: bool = False
    text: Any | None = None
    others: Sequence[Any] = ()
    more_memory: float = 0.0
    exact: bool = False
    all_weights: bool = False
    learned: int = 0
    prompts: Mapping[str, Conditioning] = field(default_factory=dict)

    def run(self, body: Callable[[GuiderDenoiser, Tensor], T]) -> T:
        """What body(denoiser, x0) returns; x0 is the latent in the model's own latent space, on the model's device.

        body must itself detach results and move them to the CPU. Raises RuntimeError before body starts when the model
        is partly offloaded or has no backward pass (some quantised formats).
        """
        if self.checkpointing and RANK_MASK in self.model.wrappers.get(WrappersMP.APPLY_MODEL, {}):
            raise ValueError(
                "The model carries a T-LoRA, whose ranks change with the noise level, and checkpointing computes its "
                "blocks again at none: switch checkpointing off, or connect the base model."
            )
        text = [] if self.text is None else [self.text]
        companions = [*text, *self.others]  # loaded together with the model
        with gradients():
            clone = trainable_clone(self.model, self.all_weights, self.exact)
            if companions:  # ComfyUI must not unload one to make room for the other
                clone.set_additional_models(COMPANIONS, companions)
            latent, guider = detached(self.latent).float(), comfy.samplers.CFGGuider(clone)
            prompts = {"positive": self.positive, "negative": self.negative, **self.prompts}
            guider.inner_set_conds({role: detached(prompt) for role, prompt in prompts.items() if prompt is not None})
            # For casts; a text encoder whose weights are all trained is counted in _memory().
            copies = size_on(self.others if self.all_weights else companions, clone.load_device)
            needed = _memory([clone, *text], latent, self.checkpointing, self.all_weights) + copies
            needed += self.more_memory
            check_room([clone, *companions], needed, clone.load_device)
            load_fully([clone, *companions], needed)
            try:
                with explain_out_of_memory():
                    return _run(guider, latent, functools.partial(self._inside, body))
            finally:
                mm.soft_empty_cache()

    def _inside(
        self, body: Callable[[GuiderDenoiser, Tensor], T], guider: Any, extra_args: dict[str, Any], x0: Tensor
    ) -> T:
        """Inside the sampler: the model fully loaded, thawed, safe for backward, checkpointed, and probed."""
        for patcher in (guider.model_patcher, *guider.loaded_models):
            if hasattr(patcher, "model_size"):
                check_fully_loaded(patcher)
        owners = [guider.inner_model, *(getattr(extra, "model", extra) for extra in guider.loaded_models)]
        parts = [part for part in owners if isinstance(part, nn.Module)]
        with contextlib.ExitStack() as stack:
            network = guider.inner_model.diffusion_model
            trained = {"diffusion_model": network} if self.all_weights else {}
            if self.all_weights and self.text is not None:
                trained["text_encoders"] = self.text.model
            weights = stack.enter_context(thawed(parts, trained))
            for part in parts:
                stack.enter_context(out_of_place(part))
            if any("control" in entry for entries in guider.conds.values() for entry in entries):
                stack.enter_context(private_skips(network))
            denoiser = GuiderDenoiser(guider, extra_args, x0)
            denoiser.leaves, denoiser.before = weights
            check_reuse(self.model, denoiser, x0[:1])  # first: checkpointing replaces calls of blocks, as a cache may
            if self.checkpointing:
                stack.enter_context(checkpointed(network))
            with calls(parts, denoiser.called.add):
                _probe(denoiser, x0[:1], self.learned)
            with denoiser.attached:
                return body(denoiser, x0)


def _memory(models: list[Any], latent: Tensor, checkpointing: bool, all_weights: bool) -> float:
    """Bytes that a session needs on top of the loaded weights; the diffusion model is the first of the models."""
    first = models[0]
    casts = first.get_model_object("manual_cast_dtype") is not None  # the gradient holds each weight a second time
    memory = first.model_size() * casts + activations(first, latent, checkpointing)
    if all_weights:
        memory += sum(BYTES_PER_WEIGHT * part.numel() for each in models for part in each.model.parameters())
    return memory


def _probe(denoiser: GuiderDenoiser, x0: Tensor, learned: int) -> None:
    """A small backward pass before any work: quantised layers and some attention kernels have none."""
    context = denoiser.context.detach().clone().requires_grad_(True)
    sigma = denoiser.sigmas[denoiser.sigmas.shape[0] // 2].to(x0).view(1)
    try:
        denoiser.denoised(x0, sigma, context).float().square().mean().backward()
    except mm.OOM_EXCEPTION:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"This model cannot be trained through ({error}): load it in fp16, bf16, fp32 or plain fp8, and connect it "
            "before nodes that change its inner tensors in place (FreeU); they may follow for sampling."
        ) from error
    if context.grad is None or not bool(torch.isfinite(context.grad).all()) or not bool(context.grad.any()):
        raise RuntimeError(
            "This model gives no usable gradient to its text rows: load it in bf16 or fp32, and check that the prompt "
            "comes from the model's own text encoder."
        )
    effective = int(context.grad[0, -learned:].any(-1).sum())
    if effective < learned:
        raise RuntimeError(
            f"This model looks at {effective} of the {learned} tokens to be learned (it masks or cuts off the end "
            "of this prompt), expected is each of them: shorten the prompt, or learn fewer tokens."
        )
