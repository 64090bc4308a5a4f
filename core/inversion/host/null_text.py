"""Reconstruct an inverted image with a MODEL: null-text optimization, and three methods that need no optimization."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...fit.runs import digest
from ...fit.train import Result, Run
from ...prompt.conditioning import Conditioning, detached, single_prompt, warn_of_rate
from ...prompt.windows import step_wise, windows
from ...session.describe import describe
from ...session.fingerprint import patches_digest, precision
from ...session.job import Fitted, Job, run
from ...session.session import GuiderDenoiser, Session
from ...session.weights import warn_of_guidance
from ..null_text import Method, NullText, NullTextSettings, Start
from ..rectify import residuals
from ..trajectory import Trajectory
from .ddim import check_trajectory
from .landing import Landing, attach_landing

Reconstruction = tuple[Conditioning, list[float] | None, str, Any]
"""What reconstructs an inverted image: negatives, losses (None when nothing was optimized), a report, the MODEL."""


def prepare_reconstruction(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    trajectory: Trajectory,
    method: Method,
    settings: NullTextSettings,
    start: Start,
) -> Reconstruction:
    """The Reconstruction by null-text optimisation, or by one of the methods without it (see null_text.py)."""
    check_trajectory(model, positive, trajectory)
    if method == "null-text":
        return null_text(model, positive, positive if start == "prompt" else negative, trajectory, settings)
    if method == "negative prompt":
        copy = [[context, options.copy()] for context, options in positive]
        return copy, None, "The negative prompt of every step is the prompt itself; no updates.", model
    levels, count = tuple(trajectory.sigmas.tolist()), trajectory.latents.shape[1]
    targets, moves = dict(enumerate(trajectory.latents[1:])), {}
    if method == "direct edit":
        scaling, path = model.get_model_object("model_sampling").noise_scaling, trajectory
        moved = residuals(lambda x0, noise, sigma: scaling(sigma, noise, x0), path.latents, path.sigmas)
        moves = dict(enumerate(moved))
    pinned = attach_landing(model, Landing(targets, levels, rows=count, residuals=moves))
    report = (
        f"The first {count} of the latents sampled together" if count > 1 else "The first latent of those sampled"
    ) + f" will be put back on the trajectory after each of {trajectory.steps} steps; no updates."
    return negative, None, report, pinned


@dataclass(frozen=True)
class NullTextJob(Job):
    """One negative per step. first: the prompt that the first negative starts from."""

    method: ClassVar[str] = "null-text"

    model: Any
    positive: Conditioning
    first: Conditioning
    trajectory: Trajectory
    settings: NullTextSettings

    @property
    def steps(self) -> int:
        return self.trajectory.steps * self.settings.inner_steps

    def key(self) -> str:
        prompts = [describe(self.positive), describe(self.first)]
        attached = [patches_digest(self.model), precision(self.model), *prompts]
        parts = [self.base, attached, self.trajectory.latents, self.trajectory.sigmas]
        return digest([self.method, asdict(self.settings), *parts])

    def is_complete(self, stored: Run) -> bool:
        return stored.step in stored.results and len(stored.last["nulls"]) == self.trajectory.steps

    def session(self) -> Session:
        latent = self.model.get_model_object("latent_format").process_out(self.trajectory.latents[-1])
        return Session(self.model, self.positive, latent, negative=self.first, exact=True)

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        parts = detached([self.trajectory.latents, self.trajectory.sigmas, self.first[0][0]])
        latents, sigmas, null = (part.to(x0.device).float() for part in parts)
        unguided = denoiser.of("negative")
        fit = NullText(denoiser, latents, sigmas, denoiser.context, null, self.settings, unguided)

        def result() -> Result:
            nulls = torch.cat(fit.nulls) if fit.nulls else null[:0]
            return {"nulls": nulls.cpu(), "counts": torch.tensor(fit.counts)}

        return fit, result


def null_text(
    model: Any, positive: Conditioning, first: Conditioning, trajectory: Trajectory, settings: NullTextSettings
) -> Reconstruction:
    """Optimise one negative per step of a trajectory, the first from a prompt on, resuming or reusing a stored run."""
    if trajectory.latents.shape[1] != 1:
        raise ValueError(
            f"The trajectory holds {trajectory.latents.shape[1]} images; each needs negatives of its own: invert one "
            "image at a time."
        )
    if settings.cfg == 1.0:
        raise ValueError(
            "With cfg 1 the negative prompt is unused: set the cfg that the image is sampled with. A model without "
            "classifier-free guidance (FLUX.1, turbo models) needs no null-text: choose direct or direct edit."
        )
    warn_of_guidance(model)
    warn_of_rate(settings.learning_rate, single_prompt(first, "negative prompt"))
    finished = run(NullTextJob(model, positive, first, trajectory, settings))
    sampling = model.get_model_object("model_sampling")
    steps = windows(trajectory.sigmas.tolist(), sampling.percent_to_sigma)
    conditioning = step_wise(first, finished.last["nulls"].split(1), steps)
    lines, begin = [], 0
    for step, count in enumerate(finished.last["counts"].tolist()):
        losses = finished.losses[begin : begin + count]
        lines.append(f"step {step + 1:3d}: {count:3d} updates, loss {losses[0]:.3g} to {losses[-1]:.3g}")
        begin += count
    report = "\n".join([*lines, f"{len(finished.losses)} updates in all"])
    return conditioning, finished.losses, report, model
