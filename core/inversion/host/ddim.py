"""Inverting a picture with a MODEL, and the ways back to it: from what the nodes got to what samplers take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...embedding.host.train import EVERY, run_store, subject
from ...fit.runs import digest
from ...fit.train import Result, Run, stored_run, train
from ...prompt.conditioning import Conditioning, detached, single_prompt
from ...prompt.windows import step_wise, windows
from ...session.describe import describe
from ...session.fingerprint import check_base, fingerprint, patches_digest, precision
from ...session.progress import Progress
from ...session.session import GuiderDenoiser, optimise, predicting
from ...session.weights import warn_of_guidance
from ..ddim import Label, invert
from ..null_text import Method, NullText, NullTextSettings, Start
from ..trajectory import Trajectory, check_sigmas
from .landing import Landing, landed

METHOD = "null-text"


def inverted(
    model: Any,
    positive: Conditioning,
    latent: dict[str, Tensor] | None,
    image: Tensor | None,
    vae: Any | None,
    sigmas: Tensor,
    label: Label,
    iterations: int,
    node_id: str | None = None,
) -> Trajectory:
    """The trajectory of a picture along SIGMAS, with the prompt that describes it and no guidance."""
    single_prompt(positive, "prompt")
    check_way(model, sigmas)
    samples = subject(model, latent, image, vae, None).latent
    bar = comfy.utils.ProgressBar(len(sigmas) - 1, node_id=node_id)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    found: list[Tensor] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        def on_step(step: int, x: Tensor) -> None:
            mm.throw_exception_if_processing_interrupted()
            show = previewer is not None and step % 10 == 0
            picture = previewer.decode_latent_to_preview_image("JPEG", x[:1].float()) if show else None
            bar.update_absolute(step, len(sigmas) - 1, picture)

        found.append(invert(denoiser, x0.float(), denoiser.context, sigmas, label, iterations, on_step).cpu())

    predicting(model, positive, samples, body)
    header = {**_origin(model, positive), "label": label}
    return Trajectory(found[0], sigmas.detach().float().cpu(), header)


def check_way(model: Any, sigmas: Tensor) -> None:
    """ValueError when a picture cannot be walked up along these levels with this model."""
    check_sigmas(sigmas)
    sampling = model.get_model_object("model_sampling")
    if not _adds_noise(sampling):
        raise ValueError(
            "This model mixes noise into the picture (SD3, FLUX and other flow models), and samplers start it from "
            "pure noise, not from an inverted picture: use SD1.x, SD2.x or SDXL."
        )
    if float(sigmas[-1]) > 1.01 * float(sampling.sigma_min):
        raise ValueError(
            f"The SIGMAS end at {float(sigmas[-1]):.4g}, where a picture is still noisy; the inversion begins at the "
            f"clean picture, at 0 or {float(sampling.sigma_min):.4g}: connect them uncut, as BasicScheduler gives them."
        )


def start_latent(model: Any, trajectory: Trajectory) -> dict[str, Tensor]:
    """The noisiest latent as a LATENT, for samplers that add no noise of their own."""
    return {"samples": model.get_model_object("latent_format").process_out(trajectory.latents[0])}


def _adds_noise(sampling: Any) -> bool:
    ones = torch.ones(1, 1, 1, 1)
    return float(sampling.noise_scaling(torch.full((1,), 0.5), 0 * ones, ones)) == 1.0


def _origin(model: Any, positive: Conditioning) -> dict[str, Any]:
    """What a trajectory belongs to: the model with the LoRAs on its weights and its sampling, and the prompt's rows."""
    rows, options = positive[0]
    return {
        "base": fingerprint(model),
        "patches": digest([describe(model.patches), describe(model.get_model_object("model_sampling"))]),
        "prompt": digest([rows, options.get("pooled_output")]),
    }


@dataclass(frozen=True)
class Nulls:
    """What null-text optimisation found: one negative for each step, its losses, and how many updates each took."""

    conditioning: Conditioning
    losses: list[float]
    counts: list[int]

    def report(self) -> str:
        """A line for each step: updates, first and last loss."""
        lines, first = [], 0
        for step, count in enumerate(self.counts):
            of_step = self.losses[first : first + count]
            lines.append(f"step {step + 1:3d}: {count:3d} updates, loss {of_step[0]:.3g} to {of_step[-1]:.3g}")
            first += count
        return "\n".join([*lines, f"{len(self.losses)} updates in all"])


def check_trajectory(model: Any, positive: Conditioning, trajectory: Trajectory) -> None:
    """ValueError when a trajectory is of another model or prompt."""
    check_base(trajectory.header.get("base", {}), model)
    single_prompt(positive, "prompt")
    origin = _origin(model, positive)
    if any(trajectory.header.get(part) != origin[part] for part in ("base", "patches")):
        raise ValueError(
            "The trajectory was made with another model (another checkpoint, LoRA or model sampling): connect the very "
            "model that the picture was inverted with."
        )
    if trajectory.header.get("prompt") != origin["prompt"]:
        raise ValueError(
            "The trajectory was made with another prompt: connect the very prompt that the picture was inverted with."
        )


@dataclass(frozen=True)
class WayBack:
    """What a sampler needs to come back to an inverted picture. losses: None where nothing was optimised."""

    model: Any
    negative: Conditioning
    losses: list[float] | None
    report: str


def way_back(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    trajectory: Trajectory,
    method: Method,
    settings: NullTextSettings,
    start: Start,
    node_id: str | None = None,
) -> WayBack:
    """By null-text optimisation, or by one of the two methods that need none (see null_text.py)."""
    if method == "null-text":
        found = null_text(model, positive, negative, trajectory, settings, node_id, start)
        return WayBack(model, found.conditioning, found.losses, found.report())
    check_trajectory(model, positive, trajectory)
    if method == "negative prompt":
        same = [[rows, options.copy()] for rows, options in positive]
        return WayBack(model, same, None, "The negative prompt of every step is the prompt itself; no updates.")
    levels, count = tuple(trajectory.sigmas.tolist()), trajectory.latents.shape[1]
    targets = dict(enumerate(trajectory.latents[1:]))
    way = landed(model, Landing(targets, levels, rows=count))
    report = (
        f"The first {count} of the latents sampled together" if count > 1 else "The first latent of those sampled"
    ) + f" will be put back on the trajectory after each of {trajectory.steps} steps; no updates."
    return WayBack(way, negative, None, report)


def null_text(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    trajectory: Trajectory,
    settings: NullTextSettings,
    node_id: str | None = None,
    start: Start = "empty prompt",
) -> Nulls:
    """Optimise (or resume, or serve from disk) one negative for each step of a trajectory."""
    check_trajectory(model, positive, trajectory)
    if trajectory.latents.shape[1] != 1:
        raise ValueError(
            f"The trajectory holds {trajectory.latents.shape[1]} pictures; each needs negatives of its own: invert one "
            "picture at a time."
        )
    if settings.cfg == 1.0:
        raise ValueError("With cfg 1 no negative prompt is looked at: set the cfg that the picture is sampled with.")
    warn_of_guidance(model)
    first = positive if start == "prompt" else negative
    single_prompt(first, "negative prompt")
    put_on = [patches_digest(model), precision(model), describe(positive), describe(first)]
    parts = [fingerprint(model), put_on, trajectory.latents, trajectory.sigmas]
    key = digest([METHOD, asdict(settings), *parts])
    total = trajectory.steps * settings.inner_steps
    progress = Progress(model, total, node_id)
    run = stored_run(run_store(), key)
    progress.start(0 if run is None else run.step)
    if run is None or not _complete(run, trajectory.steps):
        run = _optimise(model, positive, first, trajectory, settings, key, total, progress)
    result = run.kept[run.step]
    progress.curve(run.losses)
    sampling = model.get_model_object("model_sampling")
    steps = windows(trajectory.sigmas.tolist(), sampling.percent_to_sigma)
    conditioning = step_wise(first, result["nulls"].split(1), steps)
    return Nulls(conditioning, run.losses, result["counts"].tolist())


def _complete(run: Run, steps: int) -> bool:
    return run.step in run.kept and len(run.kept[run.step]["nulls"]) == steps


def _optimise(
    model: Any,
    positive: Conditioning,
    first: Conditioning,
    trajectory: Trajectory,
    settings: NullTextSettings,
    key: str,
    total: int,
    progress: Progress,
) -> Run:
    finished: list[Run] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        latents, sigmas, null = (
            each.to(x0.device).float() for each in detached([trajectory.latents, trajectory.sigmas, first[0][0]])
        )
        unguided = denoiser.of("negative")
        fit = NullText(denoiser, latents, sigmas, denoiser.context, null, settings, unguided)

        def result() -> Result:
            finished = torch.cat(fit.nulls) if fit.nulls else null[:0]
            return {"nulls": finished.cpu(), "counts": torch.tensor(fit.counts)}

        def on_update(denoised: Tensor) -> None:
            progress.update(fit.losses, denoised)

        header = {"method": METHOD, "settings": asdict(settings)}
        run = train(fit, total, EVERY, result, run_store(), key, header, on_update, done=lambda: fit.done)
        finished.append(run)

    latent_format = model.get_model_object("latent_format")
    optimise(model, positive, latent_format.process_out(trajectory.latents[-1]), body, negative=first, exact=True)
    return finished[0]
