"""SINE's guidance on a MODEL: where ComfyUI has evaluated the edit prompt, the tuned models' predictions are mixed in.

Everything stands in wrappers on a clone of the base MODEL, before any CFG: so the same model works in KSampler, with
every guider, and with other nodes' CFG patches. What a run needs is made when it starts and gone when it ends.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

from ...prompt.conditioning import Conditioning
from ...prompt.host.entries import entries_by_prompt
from ...prompt.windows import SigmaRange
from ...session.weights import GUIDANCE_PREFIX
from ..guidance import LAST_TIMESTEP, base_share, check_weights, mixed, percent_of
from .overlay import Overlay, check_separable
from .position_map import KEY as POSITION_MAP
from .position_map import PICTURE, position_map_of

KEY = GUIDANCE_PREFIX
COMPILED = "torch.compile"  # the key of ComfyUI's own wrapper
WRAPPERS = (WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class SubjectModel:
    """A tuned model's part in the guidance. weight: beta = 1 - v; the window in percent of the sampling, 0 pure
    noise.
    """

    model: Any
    conditioning: Conditioning
    weight: float
    start_percent: float
    end_percent: float

    def window(self, sampling: Any) -> SigmaRange:
        """The window as noise levels of a model_sampling."""
        return SigmaRange(sampling.percent_to_sigma(self.start_percent), sampling.percent_to_sigma(self.end_percent))


def subject_model(
    model: Any, conditioning: Conditioning, weight: float, start_percent: float, end_percent: float, k_timestep: int
) -> SubjectModel:
    """A SubjectModel from a node's values. k_timestep: K in training timesteps, instead of end_percent; -1 for none.

    ValueError for an empty window, or a K that is no timestep.
    """
    if k_timestep != -1:
        if not 0 <= k_timestep <= LAST_TIMESTEP + 1:
            raise ValueError(
                f"K is timestep {k_timestep}, the schedule has 0 to {LAST_TIMESTEP + 1}: choose one of these, or -1 "
                "to use end_percent."
            )
        end_percent = max(0.0, percent_of(k_timestep))
    if not 0.0 <= start_percent <= end_percent <= 1.0:
        raise ValueError(
            f"The guidance would begin at {start_percent:g} and end at {end_percent:g} of the sampling: give a start "
            "below the end, both in 0..1."
        )
    if not conditioning:
        raise ValueError("The tuned model has no prompt: connect its training prompt, encoded.")
    _check_prompt(conditioning, start_percent, end_percent)
    return SubjectModel(model, conditioning, weight, start_percent, end_percent)


def _check_prompt(conditioning: Conditioning, start: float, end: float) -> None:
    """ValueError for a training prompt that says nothing somewhere, or at some time, where the tuned model is asked."""
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


def guided(model: Any, subjects: list[SubjectModel], allow_over_one: bool = False) -> Any:
    """A clone of the MODEL whose prediction for the positive prompt is mixed with the tuned models'.

    A guidance that is already on the model is replaced. Raises ValueError, before anything runs, for models that cannot
    be mixed (another latent space or noise schedule) or separated, and for weights over 1.
    """
    check_weights([subject.weight for subject in subjects], allow_over_one)
    _warn_of_wrappers(subjects, model)
    own: list[Any] = []  # one tuned model for each module that is not the base model's: these are loaded beside it
    for subject in subjects:
        _check_pair(subject.model, model)
        owner = next((other for other in [model, *own] if subject.model.is_clone(other)), None)
        if owner is None:
            own.append(subject.model)
        elif owner is not subject.model:
            check_separable(subject.model, owner)
    clone = model.clone()
    drop_guidance(clone)
    clone.set_additional_models(KEY, [*own, *_control_models(subjects)])
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _Sampling(tuple(subjects), tuple(own)))
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _forget)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _predict)
    return clone


def _warn_of_wrappers(subjects: list[SubjectModel], model: Any) -> None:
    """A tuned model is asked inside the base model's sampling: it has none of its own that could be wrapped."""
    known = {id(wrapper) for wrappers in _whole_samplings(model).values() for wrapper in wrappers}
    for subject in subjects:
        found = _whole_samplings(subject.model).items()
        own = [key for key, wrappers in found if any(id(wrapper) not in known for wrapper in wrappers)]
        unused = sorted(str(key) for key in own if key not in (KEY, POSITION_MAP))
        if unused:
            log.warning(
                "What lies on the tuned model for a whole sampling takes no part (%s): put it on the base model.",
                ", ".join(unused),
            )


def _whole_samplings(model: Any) -> dict[Any, list[Any]]:
    return getattr(model, "wrappers", {}).get(WrappersMP.SAMPLER_SAMPLE, {})


def drop_guidance(clone: Any) -> None:
    """Take the guidance off a clone that is the caller's own: its own prediction is wanted, not the mix."""
    for wrapper in WRAPPERS:
        clone.remove_wrappers_with_key(wrapper, KEY)
    clone.remove_additional_models(KEY)


def guider(model: Any, positive: Conditioning, negative: Conditioning, cfg: float) -> Any:
    """ComfyUI's own CFG guider over a guided MODEL."""
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(positive, negative)
    made.set_cfg(cfg)
    return made


def _check_pair(tuned: Any, base: Any) -> None:
    if tuned.wrappers.get(WrappersMP.CALC_COND_BATCH, {}).get(KEY):
        raise ValueError(
            "The tuned model already carries a guidance: connect the tuned model itself, and add further ones with "
            "Subject Model."
        )
    one, other = (type(each.get_model_object("latent_format")).__name__ for each in (tuned, base))
    if one != other:
        raise ValueError(
            f"The tuned model works on {one} latents, the base model on {other}: tune the same base model that you "
            "sample with."
        )
    a, b = (each.get_model_object("model_sampling") for each in (tuned, base))
    ones = torch.ones(1, 1, 1, 1)
    paths = [float(sampling.noise_scaling(torch.full((1,), 0.5), ones, 3 * ones)) for sampling in (a, b)]
    same = a.sigmas.shape == b.sigmas.shape and torch.allclose(a.sigmas.float().cpu(), b.sigmas.float().cpu(), 1e-3)
    if paths[0] != paths[1] or not same:
        raise ValueError(
            f"The tuned model's noise schedule ({type(a).__name__}, {float(a.sigma_min):.4g} to "
            f"{float(a.sigma_max):.4g}) is not the base model's ({type(b).__name__}, {float(b.sigma_min):.4g} to "
            f"{float(b.sigma_max):.4g}): at one noise level they would see different images. Apply the same model "
            "sampling node (or none) to both."
        )


def _control_models(subjects: list[SubjectModel]) -> list[Any]:
    """The ControlNets and the like in the training prompts, for ComfyUI to load."""
    conds = {str(i): comfy.sampler_helpers.convert_cond(subject.conditioning) for i, subject in enumerate(subjects)}
    return comfy.sampler_helpers.get_additional_models(conds, torch.float32)[0]


class _Branch:
    """A tuned model, ready to predict in one run."""

    def __init__(self, subject: SubjectModel, running: Any, sampling: Any) -> None:
        self.weight, self.window = subject.weight, subject.window(sampling)
        self._subject, self._running = subject, running
        self._overlay = Overlay(subject.model, running)
        self._memory: tuple[Tensor, Tensor] | None = None

    def prepare(
        self, sigmas: Tensor, seed: int | None, noise: Tensor, latent: Tensor | None, mask: Tensor | None
    ) -> None:
        """Process the prompt with the tuned model's own network, as ComfyUI does for the base model."""
        device, tuned = self._running.load_device, self._subject.model
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._subject.conditioning)}
        processed = comfy.samplers.process_conds(self._running.model, noise, conds, device, latent, mask, seed)
        self._conds = processed["positive"]
        if self._overlay.rewritten:
            log.info(
                "%d weights of the tuned model are computed anew in every guided step: with memory to spare, load a "
                "copy of the checkpoint file for the tuned model.",
                self._overlay.rewritten,
            )
        tuned.model_patches_to(device)
        tuned.model_patches_to(tuned.model_dtype())
        self._options = comfy.model_patcher.create_model_options_clone(tuned.model_options)
        options = self._options.setdefault("transformer_options", {})
        for name in ("wrappers", "callbacks"):
            merge_nested_dicts(options.setdefault(name, {}), getattr(tuned, name), copy_dict1=False)
        if not self._overlay.empty:  # a compiled network does not see what is added to its layers
            calls = options["wrappers"].get(WrappersMP.APPLY_MODEL, {})
            options["wrappers"][WrappersMP.APPLY_MODEL] = {k: v for k, v in calls.items() if k != COMPILED}
        options["sample_sigmas"], options[PICTURE] = sigmas, tuple(noise.shape[-2:])

    def predict(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any]) -> Tensor:
        """The denoised prediction for the training prompt. Asked twice at one step (PAG does), it is computed once."""
        if self._memory is not None and self._memory[0] is x:
            return self._memory[1]
        options = self._options
        window = model_options.get("transformer_options", {}).get("context_window")
        if window is not None:
            options = {**options, "transformer_options": {**options["transformer_options"], "context_window": window}}
        with self._overlay.active():
            (result,) = comfy.samplers.calc_cond_batch(self._running.model, [self._conds], x, timestep, options)
        self._memory = (x, result)
        return result

    def forget(self) -> None:
        self._memory = None

    def cleanup(self) -> None:
        """As ComfyUI does for the prompts that it evaluates itself: ControlNets let go of what this run gave them."""
        self.forget()
        comfy.sampler_helpers.cleanup_models({"positive": self._conds}, [])

    def is_the_base(self, base: Any) -> bool:
        """Whether nothing but the prompt distinguishes the tuned model from the base model."""
        tuned = self._subject.model
        return self._running is base and self._overlay.empty and position_map_of(tuned) == position_map_of(base)


@dataclass(frozen=True)
class _Run:
    """One sampling: which prompts are the positive ones, and the tuned models."""

    positive: frozenset[Any]
    branches: tuple[_Branch, ...]

    def index(self, conds: list) -> int | None:
        """Where the positive prompt stands among the prompts to evaluate; guiders have different orders."""
        for index, cond in enumerate(conds):
            if cond is not None and any(entry.get("uuid") in self.positive for entry in cond):
                return index
        return None


@dataclass(frozen=True)
class _Sampling:
    """The wrapper of a whole sampling."""

    subjects: tuple[SubjectModel, ...]
    own: tuple[Any, ...]

    def __call__(
        self, executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *more
    ) -> Any:
        base = guider.model_patcher
        loaded = base.get_additional_models_with_key(KEY)[: len(self.own)]
        branches: list[_Branch] = []
        with _started(loaded, branches):
            for subject in (each for each in self.subjects if each.weight != 0.0):
                branch = _Branch(subject, self._running(subject.model, base, loaded), guider.inner_model.model_sampling)
                branch.prepare(sigmas, extra_args.get("seed"), noise, latent_image, denoise_mask)
                branches.append(branch)
                _warn(branch, base, [float(sigma) for sigma in sigmas[:-1]])
            positive = frozenset(entry["uuid"] for entry in entries_by_prompt(guider).get("positive", []))
            options = extra_args["model_options"]["transformer_options"]  # a copy of this run's own
            options[KEY] = _Run(positive, tuple(branches))
            try:
                return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *more)
            finally:
                del options[KEY]

    def _running(self, tuned: Any, base: Any, loaded: list[Any]) -> Any:
        """The loaded model in whose module a tuned model predicts; checked again, as nodes may have come between."""
        for mine, patcher in zip(self.own, loaded, strict=True):
            if tuned.is_clone(mine):
                _check_pair(tuned, base)
                if tuned is not mine:
                    check_separable(tuned, patcher)
                return patcher
        check_separable(tuned, base)
        return base


def _warn(branch: _Branch, base: Any, steps: list[float]) -> None:
    """Say what is allowed but hardly meant."""
    if branch.is_the_base(base):
        log.warning("The tuned model is the base model itself: only its prompt guides. Connect the fine-tuned model.")
    if not any(map(branch.window.holds, steps)):
        log.warning("None of the %d steps lies in a tuned model's window: it takes no part.", len(steps))


@contextlib.contextmanager
def _started(models: list[Any], branches: list[_Branch]) -> Iterator[None]:
    try:
        for model in models:
            model.pre_run()
        yield
    finally:
        for branch in branches:
            branch.cleanup()
        for model in models:
            model.cleanup()


def _run_of(model_options: dict[str, Any]) -> _Run | None:
    return model_options.get("transformer_options", {}).get(KEY)


def _forget(executor: Any, x: Tensor, timestep: Tensor, model_options: dict | None = None, *args: Any) -> Any:
    """Around every prediction of the guider: what the tuned models say holds for this one alone."""
    run = _run_of(model_options or {})
    try:
        return executor(x, timestep, model_options, *args)
    finally:
        for branch in run.branches if run else ():
            branch.forget()


def _predict(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict) -> list:
    """Around ComfyUI's evaluation of the prompts: eq. 3's mix in place of the positive one, inside the window."""
    run = _run_of(model_options)
    index = None if run is None else run.index(conds)
    if run is None or index is None:
        return executor(model, conds, x, timestep, model_options)
    sigma = float(timestep.max())
    active = [branch for branch in run.branches if branch.window.holds(sigma)]
    if not active:
        return executor(model, conds, x, timestep, model_options)
    weights = [branch.weight for branch in active]
    alone = base_share(weights) == 0.0
    if alone:
        conds = [None if place == index else cond for place, cond in enumerate(conds)]
    out = executor(model, conds, x, timestep, model_options)
    tuned = [branch.predict(x, timestep, model_options) for branch in active]
    out[index] = mixed(None if alone else out[index], tuned, weights)
    return out
