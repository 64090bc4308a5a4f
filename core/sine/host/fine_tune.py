"""Fine-tune a MODEL (and a CLIP) on an image: from the node's inputs to fine-tuned models, an artifact and losses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...denoiser import Prompt
from ...fit.runs import RunStore, digest
from ...fit.train import Result, Retention
from ...lora.artifact import FineTunedWeights, weight_differences
from ...lora.host.apply import encode_prompt
from ...lora.host.layers import LoraLayers, check_run, network_layers
from ...lora.kronecker import Kronecker
from ...lora.low_rank import (
    ATTENTION,
    TEXT_PREFIX,
    Layer,
    LowRank,
    attached_lora,
    attention_layers,
    factors,
    new_adapters,
)
from ...lora.timestep_rank import MARKER as RANKS
from ...lora.timestep_rank import TimestepRank
from ...prompt.conditioning import Conditioning, detached, single_prompt
from ...session.describe import describe
from ...session.differentiable import TextEncoder
from ...session.fingerprint import patches_digest, precision
from ...session.job import LAST, Fitted, Job, run
from ...session.session import GuiderDenoiser, Session
from ...session.stores import run_store
from ...session.weights import check_trainable_weights
from ..fine_tune import LEARNING_RATE_FULL, FineTune, FineTuneSettings, Prior, Samples
from ..position_map import marker
from .crops import CropSettings, check_images, make_samples
from .position_map import apply_fine_tune, position_map_of, takes_map, with_position_map

LORA, FULL = "LoRA", "full weights"
FORMS = {LORA: LowRank, "T-LoRA": TimestepRank, "LoKr": Kronecker}  # what the method "LoRA" trains
PROMPT = "photo of a sks dog"  # the node's default
HIGH_RATE_FULL = 1e-5  # ten times the paper's; higher rates give a warning
KEEP_EVERY = 500  # LoRAs are small: intermediate ones are stored, so that fewer steps can be requested later
KEPT_BYTES = 256 << 20
RUN_BYTES_PER_WEIGHT = 14  # weight and two moments in float32, difference in float16
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class FineTunePlan:
    """What is trained and how, besides FineTuneSettings. interpolation: of the position map; checkpointing: less
    memory, more time, the same result; layers: which ones get a LoRA (LAYERS); form: what is trained of it (FORMS);
    placed: False for a model that cannot be trained on the patches that were asked for.
    """

    crop: CropSettings
    method: str = LORA
    steps: int = 1000
    rank: int = 16
    interpolation: str = "bilinear"
    checkpointing: bool = False
    layers: str = ATTENTION
    form: str = LORA
    placed: bool = True


@dataclass(frozen=True)
class FineTuneData:
    """Images [B, H, W, 3], a mask [B or 1, H, W] or None, and their training prompt; or prior images, of the subject's
    class, whose prompt is text if the text encoder trains, else CONDITIONING.
    """

    image: Tensor
    prompt: str
    mask: Tensor | None = None
    clip: Any | None = None
    positive: Conditioning | None = None

    def conditioning(self) -> Conditioning:
        """The encoded prompt, before training."""
        if (self.clip is None) == (self.positive is None):
            connected = "neither" if self.clip is None else "both"
            raise ValueError(
                "Connect either a CLIP (the text encoder then trains too) or a CONDITIONING to 'positive' (it stays as "
                f"it is); {connected} came in."
            )
        return encode_prompt(self.clip, self.prompt) if self.positive is None else self.positive


@dataclass(frozen=True)
class FineTuneJob(Job):
    """A complete fine-tuning job. model: with its position map."""

    method: ClassVar[str] = "sine"

    model: Any
    vae: Any
    data: FineTuneData
    positive: Conditioning
    plan: FineTunePlan
    settings: FineTuneSettings
    prior: FineTuneData | None

    @property
    def steps(self) -> int:
        return self.plan.steps

    @property
    def retention(self) -> Retention:
        if self.plan.method == FULL:  # differences of all weights are large, so only the last result is kept
            return Retention(LAST, 1)
        return Retention(KEEP_EVERY, max(2, KEPT_BYTES // (4 * self._numbers)))

    @functools.cached_property
    def _numbers(self) -> int:
        if self.plan.method == FULL:
            return sum(value.numel() for module in _modules(self.model, self.data) for value in module.parameters())
        clip = self.data.clip
        layers = _layers(self.model.model, None if clip is None else clip.cond_stage_model, self.plan)
        return LoraLayers(layers, {}, False).numbers(self.plan.rank)

    def key(self) -> str:
        plan, data, clip, prior = self.plan, self.data, self.data.clip, self.prior
        text = None if clip is None else [clip.patcher, clip.layer_idx, clip.tokenizer_options, data.prompt]
        prior_parts = None
        if prior is not None:
            prior_parts = [prior.image, prior.prompt if clip is not None else describe(prior.positive)]
        usual = ((plan.layers, ATTENTION), (plan.form, LORA))  # left out, as before there was a choice
        weights = [plan.method, plan.rank, asdict(plan.crop), *(chosen for chosen, other in usual if chosen != other)]
        encoder = None if clip is None else precision(clip.patcher)
        precisions = [precision(self.model), str(self.vae.vae_dtype), encoder]
        prompt_parts = describe([self.vae.patcher, self.positive, text])
        model_parts = [self.base, patches_digest(self.model), precisions, prompt_parts]
        images = [data.image, data.mask, prior_parts, *self.objective.values()]
        return digest([self.method, weights, asdict(self.settings), model_parts, *images])

    def store(self) -> RunStore:
        return run_store(RUN_BYTES_PER_WEIGHT * self._numbers)

    @functools.cached_property
    def samples(self) -> tuple[Samples, Samples | None]:
        """The encoded images, and those of the prior."""
        steps, crop, seed = self.steps, self.plan.crop, self.settings.seed
        log.info("SINE: encoding the image(s) for %d steps", steps)
        samples, of_prior = make_samples(self.model, self.vae, self.data.image, self.data.mask, crop, seed, steps), None
        if self.prior is not None:
            whole = CropSettings(crop.resolution)
            of_prior = make_samples(self.model, self.vae, self.prior.image, None, whole, seed, steps)
            if crop.cells:  # next to patches, prior images carry the box of the whole image
                box = of_prior.x0.new_tensor([[0, 0, crop.cells, crop.cells]])
                of_prior = replace(of_prior, boxes=box.expand(of_prior.x0.shape[0], -1))
        return samples, of_prior

    @functools.cached_property
    def text(self) -> TextEncoder | None:
        """The text encoder, if it trains too."""
        return None if self.data.clip is None else TextEncoder(self.data.clip)

    def session(self) -> Session:
        return Session(
            self.model,
            self.positive,
            self.samples[0].x0[:1],
            negative=None if self.prior is None or self.text is not None else self.prior.positive,
            checkpointing=self.plan.checkpointing,
            text=None if self.text is None else self.text.patcher,
            all_weights=self.plan.method == FULL,
        )

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        text, plan, (images, prior_samples) = self.text, self.plan, self.samples
        latent_format = self.model.get_model_object("latent_format")
        prior = None
        if self.prior is not None and prior_samples is not None:
            of_prior = denoiser if text is not None else denoiser.of("negative")
            prior_prompt = _prompt_of(text, self.prior.prompt, lambda: Prompt(of_prior.context))
            prior = Prior(_in_scale(latent_format, prior_samples), prior_prompt, of_prior)
        prompt = _prompt_of(text, self.data.prompt, lambda: Prompt(denoiser.context))
        samples = _in_scale(latent_format, images)
        if plan.method == FULL:
            leaves, before = denoiser.leaves, denoiser.before
            fit = FineTune(denoiser, samples, prompt, leaves, self.settings, prior)
            return fit, lambda: weight_differences(before, leaves)
        layers = _layers(denoiser.model, None if text is None else text.patcher.model, plan)
        check_run(denoiser.model, layers, denoiser.called)
        adapters = new_adapters(layers, plan.rank, self.settings.seed, kind=FORMS[plan.form])

        def at(t: int, count: int) -> None:
            for name, adapter in adapters.items():
                if isinstance(adapter, TimestepRank) and not name.startswith(TEXT_PREFIX):  # an encoder has no timestep
                    adapter.at(t, count)

        def result() -> Result:
            return {key: value for name, adapter in adapters.items() for key, value in adapter.tensors(name).items()}

        denoiser.attached.enter_context(attached_lora(layers, adapters))
        return FineTune(denoiser, samples, prompt, factors(adapters), self.settings, prior, at), result


def fine_tune(
    model: Any,
    vae: Any,
    data: FineTuneData,
    plan: FineTunePlan,
    settings: FineTuneSettings,
    prior: FineTuneData | None = None,
) -> tuple[Any, Any | None, FineTunedWeights, list[float]]:
    """Train (or resume, or load from disk); returns the fine-tuned MODEL and CLIP, the artifact and all losses."""
    if plan.method == FULL:
        plan = replace(plan, rank=0, layers=ATTENTION, form=LORA)
    positive, crop = data.conditioning(), plan.crop if takes_map(model) else CropSettings(plan.crop.resolution)
    data = replace(data, mask=check_images(data.image, data.mask, crop))
    prior = _check(FineTuneJob(model, vae, data, positive, plan, settings, prior))
    if plan.crop.cells and not takes_map(model, positive):
        log.info(
            "Patches are off: this model, a %s, cannot be told where in an image it is. It is trained on the whole "
            "image, for which 400 to 800 steps are enough.",
            type(model.model.model_config).__name__,
        )
        plan = replace(plan, crop=CropSettings(crop.resolution), placed=False)
    mapped = with_position_map(model, plan.crop.cells, plan.interpolation) if plan.crop.cells else model
    if not plan.crop.cells:
        settings = replace(settings, recon_weight=0.0)
    job = FineTuneJob(mapped, vae, data, positive, plan, settings, prior)
    job_run = run(job)
    header, patch = _header(job, job_run.step, job_run.losses), position_map_of(mapped)
    needs = {} if patch is None else marker(patch.cells, patch.interpolation)
    needs |= {RANKS: torch.ones(1)} if header["settings"].get("form") == "T-LoRA" else {}
    tuned = FineTunedWeights({**job_run.last, **needs}, header)
    return *apply_fine_tune(tuned, model, data.clip, 1.0), tuned, job_run.losses


def _in_scale(latent_format: Any, part: Samples) -> Samples:
    """Samples in the model's own latent space."""
    x0, boxes, mask = detached([part.x0, part.boxes, part.mask])
    return Samples(latent_format.process_in(x0), boxes, mask)


def _prompt_of(text: TextEncoder | None, prompt_text: str, fixed: Callable[[], Prompt]) -> Callable[[], Prompt]:
    """A function that encodes the prompt in every update, or returns the fixed one if no text encoder is trained."""
    if text is None:
        prompt = fixed()
        return lambda: prompt
    tokens = text.tokens(prompt_text)
    return lambda: text.encode(tokens)


def _check(job: FineTuneJob) -> FineTuneData | None:
    """Check all inputs before anything is loaded, and warn about settings that work but are rarely intended; returns
    the prior, or None if it is unused.
    """
    data, plan, prior = job.data, job.plan, job.prior
    single_prompt(job.positive, "training prompt")
    if plan.method == FULL:
        check_trainable_weights(_modules(job.model, data))
    else:
        _layers(job.model.model, None, plan)
    if plan.method == FULL and job.settings.learning_rate > HIGH_RATE_FULL:
        log.warning(
            "All weights are trained at learning rate %g; the paper uses %g (0.0001 is for a LoRA). Small models may "
            "want more; Stable Diffusion may break at it.",
            *(job.settings.learning_rate, LEARNING_RATE_FULL),
        )
    if not data.prompt.strip():
        log.warning("The training prompt is empty: name the subject in it, such as '%s'.", PROMPT)
    if data.positive is not None and data.prompt == PROMPT:
        log.info(  # 'positive' may well be encoded from the default
            "'positive' is connected and 'prompt' is the default, '%s'. It is stored as the training prompt, and Load "
            "Fine-Tune encodes it: write the words there that 'positive' was encoded from.",
            PROMPT,
        )
    if not job.settings.prior_weight:
        return None
    if prior is None:
        raise ValueError("prior_weight is set but no images are connected to 'prior_image': connect them, or use 0.")
    if data.clip is not None and not prior.prompt:
        raise ValueError("prior_weight is set but 'prior_prompt' is empty: name the class, such as 'photo of a dog'.")
    if data.clip is None and prior.positive is None:
        raise ValueError("prior_weight is set but nothing is connected to 'prior_positive': encode the class's name.")
    if data.clip is None:
        single_prompt(prior.positive or [], "prior prompt")
    check_images(prior.image, None, CropSettings(plan.crop.resolution))
    return prior


def _modules(model: Any, data: FineTuneData) -> list[nn.Module]:
    return [model.model.diffusion_model, *([] if data.clip is None else [data.clip.cond_stage_model])]


def _layers(base: Any, text: nn.Module | None, plan: FineTunePlan) -> dict[str, Layer]:
    """The layers of the model and of the text encoder that get a LoRA."""
    encoder = {} if text is None else attention_layers(text, TEXT_PREFIX.removesuffix("."))
    return {**network_layers(base, plan.layers), **encoder}


def _header(job: FineTuneJob, steps: int, losses: list[float]) -> dict[str, Any]:
    data, plan = job.data, job.plan
    lora: dict[str, Any] = {"rank": plan.rank, "layers": plan.layers, "form": plan.form}
    lora = {name: value for name, value in lora.items() if value not in (0, ATTENTION, LORA)}
    patches: dict[str, Any] = {} if plan.placed else {"patches": "not on this model"}
    if plan.crop.cells:
        patches = {"crops": plan.crop.crops, "whole_image": plan.crop.whole_image}
    images = {"pictures": data.image.shape[0], "masked": data.mask is not None}
    settings = {**asdict(job.settings), **job.objective, **lora, **patches, **images}
    settings |= {"resolution": plan.crop.resolution, "steps": steps}
    return job.artifact_header(settings, losses, prompt=data.prompt, weights=plan.method)
