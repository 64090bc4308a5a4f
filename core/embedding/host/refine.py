"""Refine an embedding for each denoising step with a MODEL (HiFi Tuner, Algorithm 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...fit.fit import Fit, curve
from ...fit.runs import digest
from ...fit.train import Result
from ...prompt.conditioning import Conditioning, Placement, detached, with_room
from ...prompt.windows import windows
from ...session.describe import describe
from ...session.fingerprint import check_base, patches_digest, precision
from ...session.images import TrainingImages
from ...session.job import Job, run
from ...session.session import GuiderDenoiser, Session
from ..artifact import Embedding
from ..hifi_tuner import Regularizer, StepWise, StepWiseSettings
from .train import RegularizerOptions, key_part, source_rows

METHOD = "hifi tuner, step-wise"


@dataclass(frozen=True)
class RefiningJob(Job):
    """Algorithm 1. start [1, n, d] of the embedding; sigmas [T + 1]."""

    method: ClassVar[str] = METHOD

    model: Any
    positive: Conditioning
    images: TrainingImages
    settings: StepWiseSettings
    placement: Placement
    start: Tensor
    sigmas: Tensor
    regularizer: Regularizer | None = None

    @property
    def steps(self) -> int:
        return (len(self.sigmas) - 1) * self.settings.inner_steps

    def key(self) -> str:
        attached = [patches_digest(self.model), precision(self.model), describe(self.positive)]
        regularizer = None if self.regularizer is None else asdict(self.regularizer)
        what: list[Any] = [self.method, asdict(self.settings), self.base, attached]
        what += [self.start, self.sigmas, asdict(self.images), regularizer]
        return digest([*what, *self.objective.values(), *key_part(self.placement)])

    def session(self) -> Session:
        tokens = self.start.shape[1]
        prompt = with_room(self.positive, tokens, self.placement)
        return Session(self.model, prompt, self.images.latent, learned=tokens)

    @contextlib.contextmanager
    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Iterator[tuple[Fit, Callable[[], Result]]]:
        start, mask = detached([self.start[0], self.images.mask])
        mask = None if mask is None else mask.to(x0.device)
        regularizer = None if self.regularizer is None else Regularizer(**detached(asdict(self.regularizer)))
        levels = self.sigmas[:-1].tolist()
        context = denoiser.context.to(x0.device, torch.float32)
        fit = StepWise(denoiser, x0, context, start, levels, self.settings, regularizer, mask)
        yield fit, lambda: {"": fit.rows()}

    def header(self, before: dict[str, Any], losses: list[float]) -> dict[str, Any]:
        """The header of the artifact. before: the settings of the original embedding."""
        sampling = self.model.get_model_object("model_sampling")
        refined = {**asdict(self.settings), **self.objective}
        return {
            "method": METHOD,
            "base": self.base,
            "settings": {**before, "refined": refined, "sigmas": self.sigmas.tolist()},
            "losses": curve(losses),
            "windows": windows(self.sigmas.tolist(), sampling.percent_to_sigma),
            "placement": self.placement,
        }


@dataclass(frozen=True)
class SavedStep:
    """A saved step of an embedding; 0 is the recommended one."""

    embedding: Embedding
    step: int = 0


def refine_embedding(
    model: Any,
    positive: Conditioning,
    images: TrainingImages,
    saved: SavedStep,
    sigmas: Tensor,
    settings: StepWiseSettings,
    options: RegularizerOptions | None,
    node_id: str | None = None,
) -> tuple[Embedding, list[float]]:
    """Refine one saved step of an embedding, resuming or reusing a stored run; returns the refined embedding and the
    loss of every update.

    sigmas [T + 1] as for the sampler. The result has one saved step, with the number of the original one.
    """
    embedding, step = saved.embedding, saved.step
    check_base(embedding.header.get("base", {}), model)
    start = embedding.at(step)
    if len(start) != 1:
        raise ValueError(f"The embedding has rows for {len(start)} denoising steps already: connect the one before.")
    rows, *_ = source_rows(model, positive, None, embedding.tokens, embedding.placement)
    if rows.shape[-1] != embedding.width:
        raise ValueError(
            f"The embedding has width {embedding.width}, the prompt {rows.shape[-1]}: use the prompt and the text "
            "encoder that it was trained with."
        )
    regularizer = None if options is None else options.build(rows, embedding.tokens)
    job = RefiningJob(model, positive, images, settings, embedding.placement, start, sigmas, regularizer)
    finished = run(job, node_id)
    header = job.header(embedding.header.get("settings", {}), finished.losses)
    return Embedding({step or embedding.recommended_step: finished.last[""]}, header), finished.losses
