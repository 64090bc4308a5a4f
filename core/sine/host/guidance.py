"""SINE's guidance on a MODEL: mixes the fine-tuned models' predictions into ComfyUI's prediction for the edit prompt.

It consists of wrappers on a clone of the base MODEL and acts before CFG, so the model works in KSampler, with every
guider, and with other nodes' CFG patches. The state of a run is created when the run starts and freed when it ends.
"""

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

from ...lora.host.apply import RANK_MASK
from ...prompt.conditioning import Conditioning, warn_of_no_words
from ...prompt.host.entries import entries_by_prompt
from ...prompt.windows import SigmaRange
from ...session.weights import COMPILED, GUIDANCE_PREFIX
from ..guidance import base_share, check_weights, mix_predictions, percent_of
from .overlay import Overlay, check_separable
from .position_map import KEY as POSITION_MAP
from .position_map import PICTURE, position_map_of

KEY = GUIDANCE_PREFIX
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class SubjectModel:
    """A fine-tuned model's part in the guidance. weight: beta = 1 - v; the window in percent of the sampling, 0 is pure
    noise. Without a conditioning the model predicts the run's own prompt. share: see Overlay.
    """

    model: Any
    conditioning: Conditioning | None
    weight: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    share: float = 1.0


def subject_model(
    model: Any,
    conditioning: Conditioning,
    weight: float,
    end_percent: float,
    start_percent: float = 0.0,
    k_timestep: int = -1,
) -> SubjectModel:
    """A SubjectModel from a node's values. k_timestep: K in training timesteps, used instead of end_percent unless -1.

    ValueError for an empty window.
    """
    if k_timestep != -1:
        end_percent = max(0.0, percent_of(k_timestep))
    if start_percent > end_percent:
        raise ValueError(
            f"The guidance would begin at {start_percent:g} and end at {end_percent:g} of the sampling: give a start "
            "below the end, both in 0..1."
        )
    _check_prompt(conditioning, start_percent, end_percent)
    return SubjectModel(model, conditioning, weight, start_percent, end_percent)


def _check_prompt(conditioning: Conditioning, start: float, end: float) -> None:
    """ValueError for a training prompt that does not cover the whole image and the whole window of the guidance."""
    if any("hooks" in options for _, options in conditioning):
        raise ValueError(
            "The tuned model's prompt carries hooks (Create Hook LoRA): load the LoRA onto the tuned model with Load "
            "LoRA instead; the base model may be the same loaded model."
        )
    limited = sorted({name for _, options in conditioning for name in ("area", "mask") if name in options})
    if limited:
        raise ValueError(
            f"The tuned model's prompt is limited by {', '.join(limited)}: outside of it the tuned model would predict "
            "nothing. Connect its plain training prompt; areas and masks belong to the edit prompt."
        )
    reached = start
    for first, last in sorted((o.get("start_percent", 0.0), o.get("end_percent", 1.0)) for _, o in conditioning):
        reached = max(reached, last) if first <= reached + 1e-6 else reached
    if reached < end - 1e-6:
        raise ValueError(
            f"The tuned model's prompt says nothing from {reached:g} of the sampling on, the guidance lasts until "
            f"{end:g}: connect its plain training prompt; the guidance has a window of its own."
        )


def with_guidance(model: Any, subjects: list[SubjectModel], allow_over_one: bool = False) -> Any:
    """A clone of the MODEL whose prediction for the positive prompt is mixed with the fine-tuned models'.

    Replaces an earlier guidance. ValueError, before anything runs, for models that cannot be mixed (another latent
    space or noise schedule) or separated, and for weights over 1.
    """
    check_weights([subject.weight for subject in subjects], allow_over_one)
    kind = WrappersMP.SAMPLER_SAMPLE  # a fine-tuned model predicts within the base model's sampling
    base_ids = {id(wrapper) for wrappers in model.wrappers.get(kind, {}).values() for wrapper in wrappers}
    for subject in subjects:
        items = subject.model.wrappers.get(kind, {}).items()
        keys = [key for key, wrappers in items if any(id(wrapper) not in base_ids for wrapper in wrappers)]
        unused = sorted(str(key) for key in keys if key not in (KEY, POSITION_MAP))
        if unused:
            log.warning(
                "What lies on the tuned model for a whole sampling takes no part (%s): put it on the base model.",
                ", ".join(unused),
            )
    return attached(model, subjects, "positive")


def attached(model: Any, subjects: list[SubjectModel], prompt: str) -> Any:
    """A clone of the MODEL in whose prediction for this prompt ("positive", "negative") the others' are mixed."""
    separate: list[Any] = []  # one model per module that is not the running model's; these are loaded in addition
    for subject in subjects:
        _check_pair(subject.model, model)
        owner = next((other for other in [model, *separate] if subject.model.is_clone(other)), None)
        if owner is None:
            separate.append(subject.model)
        elif owner is not subject.model:
            check_separable(subject.model, owner)
    prompts = [subject.conditioning for subject in subjects if subject.conditioning is not None]
    conds = {str(index): comfy.sampler_helpers.convert_cond(prompt) for index, prompt in enumerate(prompts)}
    of_prompts = comfy.sampler_helpers.get_additional_models(conds, torch.float32)[0]  # such as ControlNets
    clone = model.clone()
    clone.set_additional_models(KEY, [*separate, *of_prompts])
    sampling = _Sampling(tuple(subjects), tuple(separate), prompt)
    kinds = WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH
    for kind, wrapper in zip(kinds, (sampling, _forget, _predict), strict=True):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def guider(model: Any, positive: Conditioning, negative: Conditioning, cfg: float) -> Any:
    cfg_guider = comfy.samplers.CFGGuider(model)
    cfg_guider.set_conds(positive, negative)
    cfg_guider.set_cfg(cfg)
    return cfg_guider


def _check_pair(tuned: Any, base: Any) -> None:
    if tuned.wrappers.get(WrappersMP.CALC_COND_BATCH, {}).get(KEY):
        raise ValueError(
            "The model to mix in already carries a guidance: connect the model itself, and add further tuned ones "
            "with Subject Model."
        )
    one, other = (type(each.get_model_object("latent_format")).__name__ for each in (tuned, base))
    if one != other:
        raise ValueError(
            f"The model to mix in works on {one} latents, the other on {other}: tune the same base model that you "
            "sample with."
        )
    a, b = (each.get_model_object("model_sampling") for each in (tuned, base))
    ones = torch.ones(1, 1, 1, 1)
    paths = [float(sampling.noise_scaling(torch.full((1,), 0.5), ones, 3 * ones)) for sampling in (a, b)]
    same = a.sigmas.shape == b.sigmas.shape and torch.allclose(a.sigmas.float().cpu(), b.sigmas.float().cpu(), 1e-3)
    if paths[0] != paths[1] or not same:
        raise ValueError(
            f"The noise schedule of the model to mix in ({type(a).__name__}, {float(a.sigma_min):.4g} to "
            f"{float(a.sigma_max):.4g}) is not the other's ({type(b).__name__}, {float(b.sigma_min):.4g} to "
            f"{float(b.sigma_max):.4g}): at one noise level they would see different images. Apply the same model "
            "sampling node (or none) to both."
        )


class _Branch:
    """A fine-tuned model that predicts in one run."""

    def __init__(
        self, subject: SubjectModel, running: Any, guider: Any, prompt: str, sigmas: Tensor, *inputs: Any
    ) -> None:
        """Process the prompt with the fine-tuned model's network, as ComfyUI does for the base model.

        inputs: noise, latent, mask and seed, as ComfyUI gives them.
        """
        sigma_of = guider.inner_model.model_sampling.percent_to_sigma
        self.weight = subject.weight
        self.window = SigmaRange(sigma_of(subject.start_percent), sigma_of(subject.end_percent))
        self._running = running
        self._overlay = Overlay(subject.model, running, subject.share)
        self._cache: tuple[Tensor, Tensor] | None = None
        device, tuned, own = running.load_device, subject.model, subject.conditioning
        noise, *more = inputs
        entries = guider.original_conds[prompt] if own is None else comfy.sampler_helpers.convert_cond(own)
        conds = {prompt: [dict(entry) for entry in entries]}
        with self._overlay.active():  # a network may have a part for prompts, which the fine-tuning changed too
            processed = comfy.samplers.process_conds(running.model, noise, conds, device, *more)
        self._conds = processed[prompt]
        if self._overlay.patched_weights:
            log.info(
                "%d weights of the tuned model are computed anew in every guided step: with memory to spare, load a "
                "copy of the checkpoint file for the tuned model.",
                self._overlay.patched_weights,
            )
        tuned.model_patches_to(device)
        tuned.model_patches_to(tuned.model_dtype())
        self._options = comfy.model_patcher.create_model_options_clone(tuned.model_options)
        options = self._options.setdefault("transformer_options", {})
        for name in ("wrappers", "callbacks"):
            merge_nested_dicts(options.setdefault(name, {}), getattr(tuned, name), copy_dict1=False)
        masks = running.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(RANK_MASK, [])
        if subject.share != 1.0 and masks:  # the weights that stay keep their mask
            scaled = [replace(mask, strength=mask.strength * (1 - subject.share)) for mask in masks]
            options["wrappers"].setdefault(WrappersMP.APPLY_MODEL, {})[RANK_MASK] = scaled
        if not self._overlay.empty:  # a compiled network ignores hooks on its layers
            calls = options["wrappers"].get(WrappersMP.APPLY_MODEL, {})
            options["wrappers"][WrappersMP.APPLY_MODEL] = {k: v for k, v in calls.items() if k != COMPILED}
        options["sample_sigmas"], options[PICTURE] = sigmas, tuple(noise.shape[2:])
        base = guider.model_patcher
        if running is base and self._overlay.empty and position_map_of(tuned) == position_map_of(base):
            log.warning(
                "The tuned model is the base model itself: only its prompt guides. Connect the fine-tuned model."
            )
        if not any(map(self.window.holds, sigmas[:-1].tolist())):
            log.warning("None of the %d steps lies in a tuned model's window: it takes no part.", len(sigmas) - 1)

    def predict(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Tensor:
        """The denoised prediction for the training prompt; computed once if called twice in a step, as PAG does."""
        if self._cache is not None and self._cache[0] is x:
            return self._cache[1]
        options = self._options
        window = model_options.get("transformer_options", {}).get("context_window")
        if window is not None:
            options = {**options, "transformer_options": {**options["transformer_options"], "context_window": window}}
        with self._overlay.active():
            (result,) = comfy.samplers.calc_cond_batch(self._running.model, [self._conds], x, timestep, options)
        self._cache = (x, result)
        return result

    def forget(self) -> None:
        self._cache = None

    def cleanup(self) -> None:
        """Release the ControlNets' state of this run, as ComfyUI does for the prompts that it evaluates itself."""
        self.forget()
        comfy.sampler_helpers.cleanup_models({"positive": self._conds}, [])


@dataclass(frozen=True)
class _Sampling:
    """The sampling wrapper that prepares the fine-tuned models for one run."""

    subjects: tuple[SubjectModel, ...]
    separate: tuple[Any, ...]
    prompt: str

    def __call__(
        self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *more
    ) -> Any:
        base = guider.model_patcher
        if not guider.original_conds.get(self.prompt):
            log.warning("The sampling has no %s prompt, so the guidance takes no part.", self.prompt)
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *more)
        if getattr(guider, "cfg", 1.0) != 1.0:
            both = (guider.original_conds.get(name) or [] for name in ("positive", "negative"))
            warn_of_no_words(*([[each.get("cross_attn"), each] for each in entries] for entries in both))
        loaded = base.get_additional_models_with_key(KEY)[: len(self.separate)]
        branches: list[_Branch] = []
        with contextlib.ExitStack() as stack:
            for model in loaded:
                stack.callback(model.cleanup)
                model.pre_run()
            for subject in (each for each in self.subjects if each.weight != 0.0):
                tuned, own = subject.model, zip(self.separate, loaded, strict=True)
                running = next((patcher for separate, patcher in own if tuned.is_clone(separate)), base)
                if running is not base:  # checked again, as later nodes may change it
                    _check_pair(tuned, base)
                if tuned not in self.separate:
                    check_separable(tuned, running)
                inputs = noise, latent_image, denoise_mask, extra_args.get("seed")
                branch = _Branch(subject, running, guider, self.prompt, sigmas, *inputs)
                branches.append(branch)
                stack.callback(branch.cleanup)
            entries = frozenset(entry["uuid"] for entry in entries_by_prompt(guider).get(self.prompt, []))
            options = extra_args["model_options"]["transformer_options"]  # this run's copy
            options[KEY] = entries, tuple(branches)
            stack.callback(options.pop, KEY)
            return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *more)


def _run_of(model_options: dict[str, Any]) -> tuple[frozenset[Any], tuple[_Branch, ...]]:
    """The state of one sampling: ids of the entries of the guided prompt, and the fine-tuned models."""
    return model_options.get("transformer_options", {}).get(KEY, (frozenset(), ()))


def _forget(executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, *args: Any) -> Any:
    """Wraps every prediction of the guider: clears the fine-tuned models' cached predictions afterwards."""
    try:
        return executor(x, timestep, model_options, *args)
    finally:
        for branch in _run_of(model_options or {})[1]:
            branch.forget()


def _predict(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> list:
    """Wraps ComfyUI's evaluation of the prompts: inside the window, eq. 3's mix replaces the positive prediction."""
    entries, branches = _run_of(model_options)
    sigma = float(timestep.max())
    active = [branch for branch in branches if branch.window.holds(sigma)]
    # Guiders order the prompts differently.
    places = (place for place, cond in enumerate(conds) if any(entry.get("uuid") in entries for entry in cond or ()))
    index = next(places, None)
    if index is None or not active:
        return executor(model, conds, x, timestep, model_options)
    weights = [branch.weight for branch in active]
    skip_base = base_share(weights) == 0.0
    if skip_base:
        conds = [None if place == index else cond for place, cond in enumerate(conds)]
    out = executor(model, conds, x, timestep, model_options)
    tuned = [branch.predict(x, timestep, model_options) for branch in active]
    out[index] = mix_predictions(None if skip_base else out[index], tuned, weights)
    return out
