"""Learning an embedding from a MODEL: from what the node got to a LIKENESS_EMBEDDING, its losses and previews."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...denoiser import timestep_range
from ...fit.fit import Fit, curve
from ...fit.runs import digest
from ...fit.train import Result, Retention
from ...prompt.conditioning import (
    Conditioning,
    apply_embedding,
    check_room,
    detached,
    single_prompt,
    start_rows,
    without_tail,
)
from ...session.describe import describe
from ...session.fingerprint import patches_digest, precision
from ...session.images import TrainingImages
from ...session.job import Job, run
from ...session.sampling import sample_image
from ...session.session import GuiderDenoiser, Session
from .. import hiper
from ..artifact import Embedding
from ..hifi_tuner import Anchor, AnchoredHiPer

METHOD, ANCHORED = "hiper", "hifi tuner"
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Schedule:
    """How long and how the training runs, next to what decides the learned rows themselves."""

    steps: int = hiper.STEPS
    save_every: int = hiper.SAVE_EVERY
    start_percent: float = 0.0
    end_percent: float = 1.0


@dataclass(frozen=True)
class Hold:
    """HiFi Tuner's second term: the empty prompt, how strongly its rows hold, and whether outside of the gradient."""

    empty: Conditioning
    weight: float
    decoupled: bool = False

    def anchor(self, context: Tensor, tokens: int) -> Anchor:
        """For rows of this prompt's width."""
        empty = single_prompt(self.empty, "empty prompt").detach().float().cpu()
        return Anchor(start_rows(context, empty, tokens), self.weight, self.decoupled)


@dataclass(frozen=True)
class Start:
    """Prompts beside the source prompt. empty: the rows of this one are the start, instead of the source prompt's.
    target: the embedding will be put into it; it is only checked, so that a misfit is refused before the work starts.
    hold: HiFi Tuner eq. 6 instead of HiPer's objective.
    """

    empty: Conditioning | None = None
    target: Conditioning | None = None
    hold: Hold | None = None


def source_rows(positive: Conditioning, empty: Conditioning | None, tokens: int) -> tuple[Tensor, Tensor]:
    """The source prompt's rows [1, N, d] and the rows [n, d] to start from; refuses a prompt without n unused rows."""
    rows = single_prompt(positive, "source prompt").detach().float().cpu()
    if not check_room(positive, tokens):
        log.warning(
            "This text encoder does not tell where the prompt ends: keep it below %d tokens, or the last %d rows "
            "replace words.",
            rows.shape[1] - 1 - tokens,
            tokens,
        )
    start = None if empty is None else single_prompt(empty, "empty prompt").detach().float().cpu()
    return rows, start_rows(rows, start, tokens)


@dataclass(frozen=True)
class EmbeddingJob(Job):
    """HiPer's training, or with an anchor HiFi Tuner's. rows [1, N, d] of the source prompt; start [n, d]."""

    method: ClassVar[str] = METHOD

    model: Any
    positive: Conditioning
    images: TrainingImages
    settings: hiper.HiPerSettings
    schedule: Schedule
    rows: Tensor
    start: Tensor
    anchor: Anchor | None = None

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def retention(self) -> Retention:
        return Retention(self.schedule.save_every)

    def key(self) -> str:
        put_on = [patches_digest(self.model), precision(self.model), describe(self.positive)]
        anchored = [] if self.anchor is None else [asdict(self.anchor)]
        what = [self.method, asdict(self.settings), self.schedule.save_every, self.base]
        return digest([*what, put_on, self.start, asdict(self.images), *anchored])

    def session(self) -> Session:
        return Session(self.model, self.positive, self.images.latent)

    @contextlib.contextmanager
    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Iterator[tuple[Fit, Callable[[], Result]]]:
        context, start, mask = detached([self.rows, self.start, self.images.mask])
        mask = None if mask is None else mask.to(x0.device)
        given = (denoiser, x0, context.to(x0.device), start, self.settings)
        if self.anchor is None:
            fit = hiper.HiPer(*given, mask)
        else:
            fit = AnchoredHiPer(*given, Anchor(**detached(asdict(self.anchor))), mask)
        yield fit, lambda: {"": fit.h.detach().cpu().clone()[None]}

    def header(self, steps: int, losses: list[float]) -> dict[str, Any]:
        """The header of the artifact."""
        settings = {**asdict(self.settings), "steps": steps, "save_every": self.schedule.save_every}
        settings["masked"] = self.images.mask is not None
        if self.anchor is not None:
            settings |= {"anchor_weight": self.anchor.weight, "decoupled": self.anchor.decoupled}
        method = METHOD if self.anchor is None else ANCHORED
        return {"method": method, "base": self.base, "settings": settings, "losses": curve(losses)}


def train_embedding(
    model: Any,
    positive: Conditioning,
    images: TrainingImages,
    settings: hiper.HiPerSettings,
    schedule: Schedule,
    start: Start = Start(),
    node_id: str | None = None,
) -> tuple[Embedding, list[float]]:
    """Train (or resume, or serve from disk) an embedding; returns it with the loss of every step."""
    rows, first = source_rows(positive, start.empty, settings.tokens)
    if start.target is not None:
        apply_embedding(start.target, first[None], hiper.SCALE)
    count = len(model.get_model_object("model_sampling").sigmas)
    t_low, t_high = timestep_range(count, schedule.start_percent, schedule.end_percent)
    settings = replace(settings, t_low=t_low, t_high=t_high)
    anchor = None if start.hold is None else start.hold.anchor(rows, settings.tokens)
    job = EmbeddingJob(model, positive, images, settings, schedule, rows, first, anchor)
    done = run(job, node_id)
    embedding = Embedding(
        {step: result[""] for step, result in done.results.items()}, job.header(done.step, done.losses)
    )
    return embedding, done.losses


@dataclass(frozen=True)
class Previews:
    """How preview images are sampled."""

    vae: Any
    negative: Conditioning | None
    steps: int
    cfg: float
    seed: int


def preview_images(
    model: Any,
    embedding: Embedding,
    source: Conditioning,
    target: Conditioning | None,
    shape: tuple[int, ...],
    how: Previews,
) -> Tensor:
    """[source, h] for each saved step; with a target first [target], then [source, h] and [target, 0.8 h] in turn.

    All images start from the same noise. Shape [1, C, h, w] of the latent; returns [images, H, W, 3].
    """
    prompts = [] if target is None else [target]
    source = without_tail(source)  # the tokens learned take the place of those that they started from
    for _, rows in sorted(embedding.rows.items()):
        prompts.append(apply_embedding(source, rows, 1.0))
        if target is not None:
            prompts.append(apply_embedding(target, rows, hiper.SCALE))
    size = (1, *shape[1:])

    def sampled(prompt: Conditioning) -> Tensor:
        return sample_image(
            model, how.vae, prompt, how.negative, size, steps=how.steps, cfg=how.cfg, seed=how.seed
        )  # fmt: skip

    return torch.cat([sampled(prompt) for prompt in prompts])
