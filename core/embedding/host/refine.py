"""Refine an embedding for each denoising step with a MODEL (HiFi Tuner, Algorithm 1)."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...fit.runs import digest
from ...prompt.conditioning import Conditioning, warn_of_rate
from ...prompt.windows import windows
from ...session.fingerprint import check_base
from ...session.images import TrainingImages
from ...session.job import Fitted, run
from ...session.session import GuiderDenoiser
from ..artifact import Embedding
from ..hifi_tuner import StepWise, StepWiseSettings
from .train import RegularizerOptions, TokensJob, source_rows


@dataclass(frozen=True)
class RefiningJob(TokensJob):
    """Algorithm 1. start [n, d]: the tokens of the embedding; sigmas [T + 1]."""

    method: ClassVar[str] = "hifi tuner, step-wise"

    sigmas: Tensor

    @property
    def steps(self) -> int:
        return (len(self.sigmas) - 1) * self.settings.inner_steps

    def key(self) -> str:
        regularizer = None if self.regularizer is None else asdict(self.regularizer)
        what: list[Any] = [self.method, asdict(self.settings), self.base, self.attached()]
        what += [self.start[None], self.sigmas, asdict(self.images), regularizer]
        return digest([*what, *self.objective_and_place()])

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        fit = StepWise(self.sigmas[:-1].tolist(), *self.inputs(denoiser, x0))
        return fit, lambda: {"": fit.rows()}

    def header(self, before: dict[str, Any], losses: list[float]) -> dict[str, Any]:
        """The header of the artifact. before: the settings of the original embedding."""
        sampling = self.model.get_model_object("model_sampling")
        refined, sigmas = {**asdict(self.settings), **self.objective}, self.sigmas.tolist()
        times = windows(sigmas, sampling.percent_to_sigma)
        settings = {**before, "refined": refined, "sigmas": sigmas}
        return self.artifact_header(settings, losses, windows=times, placement=self.placement)


def refine_embedding(
    model: Any,
    positive: Conditioning,
    images: TrainingImages,
    embedding: Embedding,
    sigmas: Tensor,
    settings: StepWiseSettings,
    options: RegularizerOptions,
    step: int = 0,
) -> tuple[Embedding, list[float]]:
    """Refine a saved step of an embedding, 0 for the recommended one, resuming or reusing a stored run; returns the
    refined embedding and the loss of every update.

    sigmas [T + 1] as for the sampler. The result has one saved step, with the number of the original one.
    """
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
    warn_of_rate(settings.learning_rate, rows)
    regularizer = options.regularizer(rows, embedding.tokens)
    job = RefiningJob(model, positive, images, settings, embedding.placement, start[0], regularizer, sigmas)
    finished = run(job)
    header = job.header(embedding.header.get("settings", {}), finished.losses)
    return Embedding({step or embedding.recommended_step: finished.last[""]}, header), finished.losses
