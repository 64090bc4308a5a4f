"""Fine-tuning a MODEL (and a CLIP) on a picture: from what the node got to tuned models, an artifact and its losses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor, nn

from ...fit.fit import curve
from ...fit.runs import LIMIT_BYTES, RunStore, digest
from ...fit.train import Result, Run, stored_last, stored_run, train
from ...lora.artifact import Tuned, marker, weight_differences
from ...lora.host.apply import apply_tuned, encode_prompt, with_same_map
from ...lora.low_rank import TEXT_LAYERS, attention_layers, beside, factors, new_adapters
from ...prompt.conditioning import Conditioning, detached, single_prompt
from ...session.describe import describe
from ...session.differentiable import TextEncoder
from ...session.fingerprint import fingerprint, patches_digest, precision
from ...session.progress import Progress
from ...session.session import GuiderDenoiser, optimise
from ...session.weights import check_trainable_weights
from ..fine_tune import LEARNING_RATE_FULL, FineTune, FineTuneSettings, Prior, Prompt, Samples
from .crops import Cutting, check_pictures, make_samples
from .position_map import position_map_of

METHOD = "sine"
LORA, FULL = "LoRA", "full weights"
PROMPT = "photo of a sks dog"  # the node's default
HIGH_RATE_FULL = 1e-5  # ten times the paper's; a warning is given above it
KEEP_EVERY = 500  # LoRAs are small: those on the way are kept, so that fewer steps can be asked for later
KEPT_BYTES = 256 << 20
RUN_BYTES_PER_WEIGHT = 14  # itself and two moments in float32, its difference in float16
LARGE_RUN = LIMIT_BYTES // 2  # runs above this get a folder of their own, which holds the newest
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Plan:
    """What is trained and how, next to FineTuneSettings. interpolation: of the position map; checkpointing: less
    memory, more time, the same result.
    """

    cutting: Cutting
    method: str = LORA
    steps: int = 1000
    rank: int = 16
    interpolation: str = "bilinear"
    checkpointing: bool = False


@dataclass(frozen=True)
class Subject:
    """Pictures [B, H, W, 3], a mask [B or 1, H, W] or None, and the prompt they are learned under."""

    image: Tensor
    prompt: str
    mask: Tensor | None = None
    clip: Any | None = None
    positive: Conditioning | None = None

    def conditioning(self) -> Conditioning:
        """The prompt as the model gets it before training."""
        if (self.clip is None) == (self.positive is None):
            given = "neither" if self.clip is None else "both"
            raise ValueError(
                "Connect either a CLIP (the text encoder then trains too) or a CONDITIONING to 'positive' (it stays as "
                f"it is); {given} came in."
            )
        return encode_prompt(self.clip, self.prompt) if self.positive is None else self.positive


@dataclass(frozen=True)
class PriorPictures:
    """Pictures of the subject's class; their prompt as text when the text encoder trains, else as CONDITIONING."""

    image: Tensor
    prompt: str
    positive: Conditioning | None = None


@dataclass(frozen=True)
class _Job:
    """All that decides a result, except the number of steps; with the MODEL as it is trained (with its map)."""

    model: Any
    vae: Any
    subject: Subject
    positive: Conditioning
    plan: Plan
    settings: FineTuneSettings
    prior: PriorPictures | None


def fine_tune(
    model: Any,
    vae: Any,
    subject: Subject,
    plan: Plan,
    settings: FineTuneSettings,
    prior: PriorPictures | None = None,
    node_id: str | None = None,
) -> tuple[Any, Any | None, Tuned, list[float]]:
    """Train (or resume, or serve from disk); returns the tuned MODEL and CLIP, the artifact, and every step's loss."""
    positive = subject.conditioning()
    prior = _check(model, subject, positive, plan, settings, prior)
    _advise(subject, plan, settings)
    mapped = with_same_map(model, plan.cutting.cells, plan.interpolation) if plan.cutting.cells else model
    if not plan.cutting.cells:
        settings = replace(settings, recon_weight=0.0)
    base = fingerprint(model)
    job = _Job(mapped, vae, subject, positive, plan, settings, prior)
    store = _store(model, subject, plan)
    key, run = _stored(store, _key(job, base), plan)

    progress = Progress(model, plan.steps, node_id)
    progress.start(0 if run is None else run.step)
    if run is None or not run.answers(plan.steps):
        run = _train(job, max(plan.steps, 0 if run is None else run.step), store, key, progress)
    end = run.told_end(plan.steps)
    losses = run.losses[:end]
    progress.update(losses)
    log.info("SINE: %s, %d steps, loss %.4f to %.4f", plan.method, end, losses[0], losses[-1])
    tuned = _artifact(mapped, run.kept[end], _header(base, subject, plan, settings, end, losses))
    return *apply_tuned(tuned, model, subject.clip, 1.0), tuned, losses


def _stored(store: RunStore, key: str, plan: Plan) -> tuple[str, Run | None]:
    """The stored run and its name. Of all weights only the last result is kept."""
    return stored_last(store, key, plan.steps) if plan.method == FULL else (key, stored_run(store, key, whole=False))


def _check(
    model: Any,
    subject: Subject,
    positive: Conditioning,
    plan: Plan,
    settings: FineTuneSettings,
    prior: PriorPictures | None,
) -> PriorPictures | None:
    """Refuse what cannot work before anything is loaded; the prior, if it is used at all."""
    single_prompt(positive, "training prompt")
    check_pictures(subject.image, subject.mask, plan.cutting)
    modules = _modules(model, subject)
    if plan.method == FULL:
        check_trainable_weights(modules.values())
    elif any(not layers for layers in _layers(modules).values()):
        raise ValueError(
            f"No attention layers that a LoRA of this pack knows are in this {type(model.model.model_config).__name__} "
            "model or its text encoder: use SD1.x, SD2.x or SDXL, or train full weights."
        )
    if not settings.prior_weight:
        return None
    if prior is None:
        raise ValueError("prior_weight is set but no pictures are connected to 'prior_image': connect them, or use 0.")
    if subject.clip is not None and not prior.prompt:
        raise ValueError("prior_weight is set but 'prior_prompt' is empty: name the class, such as 'photo of a dog'.")
    if subject.clip is None and prior.positive is None:
        raise ValueError("prior_weight is set but nothing is connected to 'prior_positive': encode the class's name.")
    if subject.clip is None:
        single_prompt(prior.positive or [], "prior prompt")
    check_pictures(prior.image, None, Cutting(plan.cutting.resolution))
    return prior


def _advise(subject: Subject, plan: Plan, settings: FineTuneSettings) -> None:
    """Warnings of what works but is seldom meant."""
    if plan.method == FULL and settings.learning_rate > HIGH_RATE_FULL:
        log.warning(
            "All weights are trained at learning rate %g; the paper uses %g (0.0001 is for a LoRA). Small models may "
            "want more; Stable Diffusion may break at it.",
            settings.learning_rate,
            LEARNING_RATE_FULL,
        )
    if subject.positive is not None and subject.prompt == PROMPT:
        log.info(  # the default may well be what it was encoded from
            "'positive' is connected and 'prompt' is the default, '%s'. It is stored as the training prompt, and Load "
            "Fine-Tune encodes it: write the words there that 'positive' was encoded from.",
            PROMPT,
        )


def _modules(model: Any, subject: Subject) -> dict[str, nn.Module]:
    """What may be trained, by the prefix of its names."""
    modules = {"diffusion_model": model.model.diffusion_model}
    return modules if subject.clip is None else {**modules, "text_encoders": subject.clip.cond_stage_model}


def _layers(modules: dict[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """What a LoRA is put beside: the attention layers of each module."""
    ends = {"text_encoders": (TEXT_LAYERS,)}
    return {prefix: attention_layers(module, prefix, *ends.get(prefix, ())) for prefix, module in modules.items()}


def _key(job: _Job, base: dict[str, str]) -> str:
    """The name of the run."""
    plan, subject, clip, prior = job.plan, job.subject, job.subject.clip, job.prior
    text = None if clip is None else [clip.patcher, clip.layer_idx, clip.tokenizer_options, subject.prompt]
    others = None if prior is None else [prior.image, prior.prompt if clip is not None else describe(prior.positive)]
    what = [plan.method, plan.rank if plan.method == LORA else 0, asdict(plan.cutting)]
    precisions = [precision(job.model), str(job.vae.vae_dtype), None if clip is None else precision(clip.patcher)]
    put_on = [base, patches_digest(job.model), precisions, describe([job.vae.patcher, job.positive, text])]
    return digest([METHOD, what, asdict(job.settings), put_on, subject.image, subject.mask, others])


def _store(model: Any, subject: Subject, plan: Plan) -> RunStore:
    """Where the run is kept."""
    return store_for(RUN_BYTES_PER_WEIGHT * _count(_modules(model, subject), plan))


def store_for(size: int) -> RunStore:
    """Where a run of so many bytes is kept: below likeness in ComfyUI's user directory, large ones apart."""
    folder = Path(folder_paths.get_user_directory()) / "likeness"
    if size <= LARGE_RUN:
        return RunStore(folder / "runs")
    return RunStore(folder / "large_runs", size * 3 // 2)


def _count(modules: dict[str, nn.Module], plan: Plan) -> int:
    """Numbers that will be trained."""
    if plan.method == FULL:
        return sum(value.numel() for module in modules.values() for value in module.parameters())
    shapes = [layer.state_dict()["weight"].shape for part in _layers(modules).values() for layer in part.values()]
    return sum(plan.rank * (shape[0] + shape[1:].numel()) for shape in shapes)


def _samples(job: _Job, steps: int) -> tuple[Samples, Samples | None]:
    """The pictures for so many updates, and those of the prior."""
    cutting, seed = job.plan.cutting, job.settings.seed
    samples = make_samples(job.model, job.vae, job.subject.image, job.subject.mask, cutting, seed, steps)
    if job.prior is None:
        return samples, None
    others = make_samples(job.model, job.vae, job.prior.image, None, Cutting(cutting.resolution), seed, steps)
    if cutting.cells:  # beside patches they carry the box of the whole picture
        whole = others.x0.new_tensor([[0, 0, cutting.cells, cutting.cells]])
        others = replace(others, boxes=whole.expand(others.x0.shape[0], -1))
    return samples, others


def _train(job: _Job, steps: int, store: RunStore, key: str, progress: Progress) -> Run:
    """Train to plan.steps; `steps` is how far the run goes at most, with what is stored of it."""
    log.info("SINE: encoding the picture(s) for %d steps", steps)
    samples, others = _samples(job, steps)
    subject, plan, prior = job.subject, job.plan, job.prior
    finished: list[Run] = []
    text = None if subject.clip is None else TextEncoder(subject.clip)
    latent_format = job.model.get_model_object("latent_format")

    def in_models_scale(part: Samples) -> Samples:
        x0, boxes, mask = detached([part.x0, part.boxes, part.mask])
        return Samples(latent_format.process_in(x0), boxes, mask, part.period)

    def prompt_of(words: str, rows: Callable[[], Prompt]) -> Callable[[], Prompt]:
        if text is None:
            fixed = rows()
            return lambda: fixed
        tokens = text.tokens(words)
        return lambda: text.encode(tokens)

    def body(denoiser: GuiderDenoiser, _x0: Tensor) -> None:
        classes = None
        if prior is not None and others is not None:
            classes = Prior(in_models_scale(others), prompt_of(prior.prompt, lambda: _prompt(prior.positive)))
        prompt = prompt_of(subject.prompt, lambda: Prompt(denoiser.context))
        trained = _Trained(denoiser, text, plan, job.settings.seed)
        with trained.active():
            fit = FineTune(denoiser, in_models_scale(samples), prompt, trained.parameters, job.settings, classes)

            def on_update(denoised: Tensor) -> None:
                progress.update(fit.losses, denoised)

            every, keep = trained.keeping()
            header = {"method": METHOD, "settings": asdict(job.settings)}
            finished.append(train(fit, plan.steps, every, trained.result, store, key, header, on_update, keep))

    optimise(
        job.model,
        job.positive,
        samples.x0[:1],
        body,
        checkpointing=plan.checkpointing,
        text=None if text is None else text.patcher,
        all_weights=plan.method == FULL,
    )
    return finished[0]


def _prompt(positive: Conditioning | None) -> Prompt:
    (rows, options), *_ = detached(positive or [])
    return Prompt(rows, options.get("pooled_output"))


class _Trained:
    """What is trained inside a session: LoRAs beside the layers, or the weights themselves."""

    def __init__(self, denoiser: GuiderDenoiser, text: TextEncoder | None, plan: Plan, seed: int) -> None:
        self.full = plan.method == FULL
        self._layers: dict[str, nn.Module] = {}
        if self.full:
            self._before = {name: leaf.detach().to("cpu", copy=True) for name, leaf in denoiser.leaves.items()}
            self.parameters = denoiser.leaves
            return
        modules = {"diffusion_model": denoiser.model.diffusion_model}
        if text is not None:
            modules["text_encoders"] = text.patcher.model
        for layers in _layers(modules).values():  # ty: ignore[invalid-argument-type]
            self._layers |= layers
        self._adapters = new_adapters(self._layers, plan.rank, seed)
        self.parameters = factors(self._adapters)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """While entered, the LoRAs count."""
        return contextlib.nullcontext() if self.full else beside(self._layers, self._adapters)

    def result(self) -> Result:
        """The tensors of the artifact, as they are now."""
        if self.full:
            return weight_differences(self._before, dict(self.parameters))
        return {key: value for name, adapter in self._adapters.items() for key, value in adapter.tensors(name).items()}

    def keeping(self) -> tuple[int, int]:
        """Every how many steps a result is kept, and how many of them at most."""
        if self.full:
            return 1 << 62, 1
        size = sum(4 * value.numel() for value in self.parameters.values())
        return KEEP_EVERY, max(2, KEPT_BYTES // size)


def _artifact(model: Any, result: Result, header: dict[str, Any]) -> Tuned:
    found = position_map_of(model)
    needed = {} if found is None else marker(found.cells, found.interpolation)
    return Tuned({**result, **needed}, header)


def _header(
    base: dict[str, str], subject: Subject, plan: Plan, settings: FineTuneSettings, steps: int, losses: list[float]
) -> dict[str, Any]:
    chosen = {"rank": plan.rank} if plan.method == LORA else {}
    patches = {"crops": plan.cutting.crops, "whole_image": plan.cutting.whole_image} if plan.cutting.cells else {}
    pictures = {"pictures": subject.image.shape[0], "masked": subject.mask is not None}
    return {
        "method": METHOD,
        "base": base,
        "prompt": subject.prompt,
        "weights": plan.method,
        "settings": {
            **asdict(settings),
            **chosen,
            **patches,
            **pictures,
            "resolution": plan.cutting.resolution,
            "steps": steps,
        },
        "losses": curve(losses),
    }
