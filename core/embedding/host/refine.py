"""Refining an embedding for each denoising step with a MODEL (HiFi Tuner, Algorithm 1)."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ...fit.fit import curve
from ...fit.runs import digest
from ...fit.train import Result, Run, stored_run, train
from ...inversion.trajectory import check_sigmas
from ...prompt.conditioning import Conditioning, detached
from ...prompt.windows import windows
from ...session.describe import describe
from ...session.fingerprint import check_base, fingerprint, patches_digest, precision
from ...session.progress import Progress
from ...session.session import GuiderDenoiser, optimise
from ..artifact import Embedding
from ..hifi_tuner import Anchor, StepWise, StepWiseSettings
from .train import EVERY, Hold, Subject, run_store, source_rows

METHOD = "hifi tuner, step-wise"
log = logging.getLogger("likeness")


def refine_embedding(
    model: Any,
    positive: Conditioning,
    pictures: Subject,
    embedding: Embedding,
    step: int,
    sigmas: Tensor,
    settings: StepWiseSettings,
    hold: Hold | None,
    node_id: str | None = None,
) -> tuple[Embedding, list[float]]:
    """Refine (or resume, or serve from disk) one saved step of an embedding; returns it with the loss of every update.

    sigmas [T + 1] as the sampler takes them. The result has one saved step, the number of the one that it came from.
    """
    check_base(embedding.header.get("base", {}), model)
    check_sigmas(sigmas)
    start = embedding.at(step)
    if len(start) != 1:
        raise ValueError(f"The embedding has rows for {len(start)} denoising steps already: connect the one before.")
    rows, _ = source_rows(positive, None, embedding.tokens)
    if rows.shape[-1] != embedding.width:
        raise ValueError(
            f"The embedding has width {embedding.width}, the prompt {rows.shape[-1]}: use the prompt and the text "
            "encoder that it was trained with."
        )
    anchor = None if hold is None else hold.anchor(rows, embedding.tokens)
    levels = sigmas[:-1].tolist()
    base = fingerprint(model)
    put_on = [patches_digest(model), precision(model), describe(positive)]
    held = None if anchor is None else asdict(anchor)
    key = digest([METHOD, asdict(settings), base, put_on, start, sigmas, asdict(pictures), held])

    total = len(levels) * settings.inner_steps
    progress = Progress(model, total, node_id)
    run = stored_run(run_store(), key, whole=False)
    progress.start(0 if run is None else run.step)
    if run is None or not run.answers(total):
        run = _refine(model, positive, rows, start[0], pictures, levels, settings, anchor, key, progress)
    progress.update(run.losses)
    log.info("Step-wise: %d updates, loss %.4f to %.4f", total, run.losses[0], run.losses[-1])
    before = embedding.header.get("settings", {})
    header = {
        "method": METHOD,
        "base": base,
        "settings": {**before, "refined": asdict(settings), "sigmas": [*levels, float(sigmas[-1])]},
        "losses": curve(run.losses),
        "windows": windows(sigmas.tolist(), model.get_model_object("model_sampling").percent_to_sigma),
    }
    return Embedding({step or embedding.recommended_step: run.kept[total][""]}, header), run.losses


def _refine(
    model: Any,
    positive: Conditioning,
    rows: Tensor,
    start: Tensor,
    pictures: Subject,
    levels: list[float],
    settings: StepWiseSettings,
    anchor: Anchor | None,
    key: str,
    progress: Progress,
) -> Run:
    finished: list[Run] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        context, first, mask, held = detached([rows, start, pictures.mask, None if anchor is None else asdict(anchor)])
        mask = None if mask is None else mask.to(x0.device)
        hold = None if held is None else Anchor(**held)
        fit = StepWise(denoiser, x0, context.to(x0.device), first, levels, settings, hold, mask)

        def result() -> Result:
            return {"": fit.rows()}

        def on_update(denoised: Tensor) -> None:
            progress.update(fit.losses, denoised)

        header = {"method": METHOD, "settings": asdict(settings)}
        total = len(levels) * settings.inner_steps
        finished.append(train(fit, total, EVERY, result, run_store(), key, header, on_update))

    optimise(model, positive, pictures.latent, body)
    return finished[0]
