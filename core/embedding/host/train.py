"""Train an embedding with a MODEL: from a node's inputs to a LIKENESS_EMBEDDING, its losses and previews."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import comfy.sample
import torch
from torch import Tensor

from ...denoiser import timestep_range
from ...fit.fit import Fit, evenly
from ...fit.presets import FAST, settings_of
from ...fit.runs import digest
from ...fit.train import Retention
from ...prompt.conditioning import (
    CHUNK,
    TAIL,
    TAIL_OF_PADDING,
    Conditioning,
    Placement,
    apply_embedding,
    check_room,
    detached,
    padding_rows,
    placement_for,
    single_prompt,
    start_rows,
    warn_of_rate,
    with_room,
)
from ...session.describe import describe
from ...session.fingerprint import fingerprint, patches_digest, precision
from ...session.images import TrainingImages
from ...session.job import Fitted, Job, run
from ...session.progress import Steps
from ...session.sampling import decoded, kind_of
from ...session.session import GuiderDenoiser, Session
from ...session.stores import kept
from .. import hiper
from ..artifact import Embedding
from ..hifi_tuner import Regularizer
from ..presets import EMPTY, SOURCE, presets_for
from .so_far import NEW, so_far

METHOD, METHOD_REGULARIZED = "hiper", "hifi tuner"
PREVIEWED = 3  # saved steps that are shown at most, the last among them
PREVIEW_SHARE = 0.04  # of the training's cost, for previews at its end; one is always made
UPDATE = 2.2  # evaluations of the model that an update costs, forward and backward
SAMPLER, SCHEDULER = "euler", "ddim_uniform"  # together: DDIM with eta 0, as in the papers
ANCHORS = ("in the loss", "decoupled")
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Schedule:
    """Number of steps, saving interval, and the window of the sampling process to train on."""

    steps: int = hiper.STEPS
    save_every: int = hiper.SAVE_EVERY
    start_percent: float = 0.0
    end_percent: float = 1.0


@dataclass(frozen=True)
class RegularizerOptions:
    """HiFi Tuner's regularizer: the empty prompt, the weight (0: none), and how it is applied, one of ANCHORS."""

    negative: Conditioning | None = None
    anchor_weight: float = 0.0
    anchor: str = ANCHORS[0]

    def regularizer(self, context: Tensor, tokens: int) -> Regularizer | None:
        """The Regularizer for the last `tokens` tokens of a prompt with this context."""
        if self.anchor_weight == 0.0:
            return None
        if self.negative is None:
            raise ValueError(
                f"anchor_weight is {self.anchor_weight} but nothing is connected to 'negative': connect the empty "
                "prompt there, or set anchor_weight to 0."
            )
        empty = single_prompt(self.negative, "empty prompt").detach().float().cpu()
        return Regularizer(start_rows(context, empty, tokens), self.anchor_weight, self.anchor == ANCHORS[1])


@dataclass(frozen=True)
class TrainingPrompts(RegularizerOptions):
    """Prompts besides the source prompt. With a weight, HiFi Tuner's eq. 6 is the objective instead of HiPer's. target:
    the prompt that will get the embedding; it is checked before the training starts and drawn while it runs, guided
    away from `negative` by preview_cfg. init: where the tokens start, EMPTY for those of `negative`.
    """

    target: Conditioning | None = None
    init: str = SOURCE
    preview_cfg: float = 7.5

    def __post_init__(self) -> None:
        if self.init == EMPTY and self.negative is None:
            raise ValueError(
                "init is 'empty prompt' but nothing is connected to 'negative': connect the empty prompt there."
            )

    @property
    def shown(self) -> Conditioning | None:
        """The target that is drawn while the training runs; None for one of several prompts, or none."""
        return self.target if self.target and len(self.target) == 1 else None


def source_rows(
    model: Any, positive: Conditioning, empty: Conditioning | None, tokens: int, placement: Placement | None = None
) -> tuple[Tensor, Tensor, Placement]:
    """The source prompt's token embeddings [1, N, d], the initial tokens [n, d] and where they stand, unless that is
    given; ValueError for a padded prompt without n padding tokens.
    """
    rows = single_prompt(positive, "source prompt").detach().float().cpu()
    placement = placement or placement_for(model, positive)
    if placement == TAIL_OF_PADDING:
        check_room(positive, tokens)
    warn_of_empty(positive, "source prompt", "describe the image plainly in it, as HiPer does")
    start = None if empty is None else single_prompt(empty, "empty prompt").detach().float().cpu()
    return rows, start_rows(rows, start, tokens), placement


def warn_of_empty(prompt: Conditioning, name: str, remedy: str) -> None:
    """A warning for a prompt without a word, as far as its text encoder tells."""
    if any(padding_rows(rows, options.get("pooled_output")) == CHUNK - 2 for rows, options in prompt):
        log.warning("The %s is empty: %s.", name, remedy)


@dataclass(frozen=True)
class TokensJob(Job):
    """What the trainings of tokens share. start [n, d]: the initial tokens."""

    model: Any
    positive: Conditioning
    images: TrainingImages
    settings: Any
    placement: Placement
    start: Tensor
    regularizer: Regularizer | None

    def attached(self) -> list[Any]:
        """Of a run's key: what is on top of the model's weights, and the prompt."""
        return [patches_digest(self.model), precision(self.model), describe(self.positive)]

    def session(self) -> Session:
        tokens = len(self.start)
        prompt = with_room(self.positive, tokens, self.placement)
        return Session(self.model, prompt, self.images.latent, learned=tokens)

    def inputs(self, denoiser: GuiderDenoiser, x0: Tensor) -> tuple[Any, ...]:
        """What the fit is made of."""
        start, mask = detached([self.start, self.images.mask])
        mask = None if mask is None else mask.to(x0.device)
        regularizer = None if self.regularizer is None else Regularizer(**detached(asdict(self.regularizer)))
        return denoiser, x0, denoiser.context.to(x0.device, torch.float32), start, self.settings, mask, regularizer

    def objective_and_place(self) -> list[Any]:
        """Of a run's key, at its end; no place where stored runs have none."""
        return [*self.objective.values(), *([] if self.placement == TAIL_OF_PADDING else [self.placement])]


@dataclass(frozen=True)
class EmbeddingJob(TokensJob):
    """HiPer's training, or HiFi Tuner's with a regularizer."""

    method: ClassVar[str] = METHOD

    schedule: Schedule
    prompts: TrainingPrompts = TrainingPrompts()

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def retention(self) -> Retention:
        return Retention(self.schedule.save_every)

    def key(self) -> str:
        regularizer = [] if self.regularizer is None else [asdict(self.regularizer)]
        what: list[Any] = [self.method, asdict(self.settings), self.schedule.save_every, self.base]
        what += [self.attached(), self.start, asdict(self.images), *regularizer]
        return digest([*what, *self.objective_and_place()])

    def session(self) -> Session:
        session = super().session()
        if self.prompts.shown is None:
            return session
        target = with_room(self.prompts.shown, len(self.start), self.placement)
        return replace(session, negative=self.prompts.negative, prompts={NEW: target})

    def so_far(self, denoiser: GuiderDenoiser, fit: Fit, x0: Tensor) -> Tensor | None:
        if self.prompts.shown is None:
            return None
        cfg = None if self.prompts.negative is None else self.prompts.preview_cfg
        return so_far(denoiser, fit.parameters["h"], x0, cfg, self.settings.seed)

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        fit = hiper.HiPer(*self.inputs(denoiser, x0))
        fast = settings_of(presets_for(denoiser.context), FAST, kind_of(self.model))["learning_rate"]
        fit.advice = f"learning_rate is {self.settings.learning_rate}, the preset '{FAST}' has {fast}; try a lower one."
        return fit, lambda: {"": fit.h.detach().cpu().clone()[None]}

    def header(self, steps: int, losses: list[float]) -> dict[str, Any]:
        """The header of the artifact."""
        settings = {**asdict(self.settings), "steps": steps, "save_every": self.schedule.save_every, **self.objective}
        settings["masked"] = self.images.mask is not None
        if self.regularizer is not None:
            settings |= {"anchor_weight": self.regularizer.weight, "decoupled": self.regularizer.decoupled}
        method = METHOD if self.regularizer is None else METHOD_REGULARIZED
        return self.artifact_header(settings, losses, method=method, placement=self.placement)


def train_embedding(
    model: Any,
    positive: Conditioning,
    images: TrainingImages,
    settings: hiper.HiPerSettings,
    schedule: Schedule,
    prompts: TrainingPrompts = TrainingPrompts(),
) -> tuple[Embedding, list[float]]:
    """Train an embedding, resuming or reusing a stored run; returns it and the loss of every step."""
    empty = prompts.negative if prompts.init == EMPTY else None
    rows, initial, placement = source_rows(model, positive, empty, settings.tokens)
    if prompts.target is not None:
        apply_embedding(prompts.target, initial[None], hiper.SCALE, (), placement)
        warn_of_empty(prompts.target, "prompt on 'target'", "write what you want to see")
    warn_of_rate(settings.learning_rate, rows)
    count = len(model.get_model_object("model_sampling").sigmas)
    t_low, t_high = timestep_range(count, schedule.start_percent, schedule.end_percent)
    settings = replace(settings, t_low=t_low, t_high=t_high)
    regularizer = prompts.regularizer(rows, settings.tokens)
    job = EmbeddingJob(model, positive, images, settings, placement, initial, regularizer, schedule, prompts)
    finished = run(job)
    saved = {step: result[""] for step, result in finished.results.items()}
    return Embedding(saved, job.header(finished.step, finished.losses)), finished.losses


@dataclass(frozen=True)
class Previews:
    """Sampling settings of preview images; without a negative prompt, cfg is 1."""

    vae: Any
    negative: Conditioning | None
    steps: int
    cfg: float
    seed: int

    def drawn(
        self,
        model: Any,
        prompts: Sequence[Conditioning],
        shape: tuple[int, ...],
        images: int = 1,
    ) -> Tensor:
        """`images` for each prompt, from the same noise: [prompts x images, H, W, 3]. Their latents are kept with the
        runs, so that a served training costs no sampling. shape [1, C, h, w]: of a latent.
        """
        attached = [fingerprint(model), patches_digest(model), precision(model), describe(self.negative)]
        settings = [self.steps, self.cfg, self.seed, list(shape), images]
        key = digest(["images of prompts", *attached, *settings, *(describe(prompt) for prompt in prompts)])

        def sampled() -> Tensor:
            progress, latents, empty = Steps(model, len(prompts) * images), list[Tensor](), torch.zeros(shape)
            for prompt in prompts:
                negative, cfg = (prompt, 1.0) if self.negative is None else (self.negative, self.cfg)
                for seed in range(self.seed, self.seed + images):
                    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                    latent = comfy.sample.sample(
                        model, noise, self.steps, cfg, SAMPLER, SCHEDULER, prompt, negative, empty,
                        disable_pbar=True, seed=seed,
                    )  # fmt: skip
                    latents.append(latent)
                    progress.step()
            return torch.cat(latents)

        return decoded(self.vae, kept(key, sampled))


def preview_images(
    model: Any,
    embedding: Embedding,
    source: Conditioning,
    target: Conditioning | None,
    shape: tuple[int, ...],
    how: Previews,
) -> Tensor:
    """[source, h] for PREVIEWED of the saved steps; with a target, first [target], then alternately [source, h] and
    [target, 0.8 h]. Where these would cost more than PREVIEW_SHARE of the training, fewer: earlier steps are left out
    first, then [target], then [source, h].

    All images start from the same noise. Shape [1, C, h, w] of the latent; returns [images, H, W, 3].
    """
    steps = sorted(embedding.rows)
    cost = how.steps * (1 if how.negative is None or how.cfg == 1.0 else 2)
    most = max(1, int(PREVIEW_SHARE * UPDATE * steps[-1] / cost))
    shown = evenly(steps, min(PREVIEWED, max(1, most if target is None else (most - 1) // 2)))
    prompts = [] if target is None else [target]
    # Without the mark of an embedding: the learned tokens replace those they started from.
    source = [[text, {name: value for name, value in options.items() if name != TAIL}] for text, options in source]
    for step in shown:
        rows = embedding.rows[step]
        prompts.append(apply_embedding(source, rows, 1.0, (), embedding.placement))
        if target is not None:
            prompts.append(apply_embedding(target, rows, hiper.SCALE, (), embedding.placement))
    return how.drawn(model, prompts[-most:], (1, *shape[1:]))
