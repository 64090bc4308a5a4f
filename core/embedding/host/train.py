"""Learning an embedding from a MODEL: from what the node got to a LIKENESS_EMBEDDING, its losses and previews."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ...denoiser import latent_mask, timestep_range
from ...fit.fit import curve
from ...fit.runs import RunStore, digest
from ...fit.train import Result, Run, stored_run, train
from ...prompt.conditioning import (
    Conditioning,
    apply_embedding,
    check_room,
    detached,
    single_prompt,
    start_rows,
    unmarked,
)
from ...session.describe import describe
from ...session.fingerprint import fingerprint, patches_digest, precision
from ...session.progress import Progress
from ...session.sampling import sample_picture
from ...session.session import GuiderDenoiser, optimise
from .. import hiper
from ..artifact import Embedding
from ..hifi_tuner import Anchor, AnchoredHiPer

METHOD, ANCHORED = "hiper", "hifi tuner"
EVERY = 1 << 62  # of a run whose only result is its last
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Subject:
    """What is learned from: latent [B, C, h, w] as in a LATENT; mask [B or 1, 1, h, w] of ones and zeros, or None."""

    latent: Tensor
    mask: Tensor | None


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


def run_store() -> RunStore:
    """ComfyUI's user directory, under likeness/runs."""
    return RunStore(Path(folder_paths.get_user_directory()) / "likeness" / "runs")


def subject(
    model: Any, latent: dict[str, Tensor] | None, image: Tensor | None, vae: Any | None, mask: Tensor | None
) -> Subject:
    """The picture(s) to learn from, checked against the model; ValueError says what is missing or does not fit."""
    if (latent is None) == (image is None):
        given = "neither" if latent is None else "both"
        raise ValueError(f"Connect either a LATENT, or an IMAGE with its VAE; {given} came in.")
    if image is not None and vae is None:
        raise ValueError(
            "An IMAGE is connected without a VAE: connect the checkpoint's VAE, or encode the picture to a LATENT."
        )
    if latent is not None:
        samples = latent["samples"]
    else:
        assert image is not None and vae is not None  # checked above
        samples = vae.encode(image[..., :3])
    channels = model.get_model_object("latent_format").latent_channels
    if getattr(samples, "is_nested", False) or samples.ndim != 4 or samples.shape[1] != channels:
        shape = "a video or nested latent" if getattr(samples, "is_nested", False) else tuple(samples.shape)
        raise ValueError(
            f"The latent is {shape}, the model expects pictures [batch, {channels}, height, width]: use its own VAE."
        )
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("The latent holds NaN or infinite numbers: encode the picture again, with the VAE in fp32.")
    samples = samples.float().cpu()
    if mask is None:
        return Subject(samples, None)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.shape[0] not in (1, samples.shape[0]):
        raise ValueError(
            f"{mask.shape[0]} masks came with {samples.shape[0]} pictures: give one mask, or one for each picture."
        )
    return Subject(samples, latent_mask(mask.float().cpu(), *samples.shape[-2:]))


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


def train_embedding(
    model: Any,
    positive: Conditioning,
    pictures: Subject,
    settings: hiper.HiPerSettings,
    schedule: Schedule,
    empty: Conditioning | None = None,
    target: Conditioning | None = None,
    hold: Hold | None = None,
    node_id: str | None = None,
) -> tuple[Embedding, list[float]]:
    """Train (or resume, or serve from disk) an embedding; returns it with the loss of every step.

    empty: the prompt whose rows it starts from, instead of the source prompt's. target: a prompt that the embedding
    will be put into; only checked, so that it is refused before the work starts. hold: HiFi Tuner eq. 6 instead of
    HiPer's objective.
    """
    rows, start = source_rows(positive, empty, settings.tokens)
    anchor = None if hold is None else hold.anchor(rows, settings.tokens)
    if target is not None:
        apply_embedding(target, start[None], hiper.SCALE)
    count = len(model.get_model_object("model_sampling").sigmas)
    t_low, t_high = timestep_range(count, schedule.start_percent, schedule.end_percent)
    settings = hiper.HiPerSettings(**{**asdict(settings), "t_low": t_low, "t_high": t_high})
    base = fingerprint(model)
    put_on = [patches_digest(model), precision(model), describe(positive)]
    held = [] if anchor is None else [asdict(anchor)]
    key = digest([METHOD, asdict(settings), schedule.save_every, base, put_on, start, asdict(pictures), *held])

    progress = Progress(model, schedule.steps, node_id)
    run = stored_run(run_store(), key, whole=False)
    progress.start(0 if run is None else run.step)
    if run is None or not run.answers(schedule.steps):
        run = _train(model, positive, rows, start, pictures, settings, schedule, anchor, key, progress)
    end, results = run.results(schedule.steps, schedule.save_every)
    kept = {step: result[""] for step, result in results.items()}
    losses = run.losses[:end]
    progress.update(losses)
    log.info("Embedding: %d steps, loss %.4f to %.4f", end, losses[0], losses[-1])
    header = {
        "method": METHOD if anchor is None else ANCHORED,
        "base": base,
        "settings": {
            **asdict(settings),
            "steps": end,
            "save_every": schedule.save_every,
            "masked": pictures.mask is not None,
            **({} if anchor is None else {"anchor_weight": anchor.weight, "decoupled": anchor.decoupled}),
        },
        "losses": curve(losses),
    }
    return Embedding(kept, header), losses


def _train(
    model: Any,
    positive: Conditioning,
    rows: Tensor,
    start: Tensor,
    pictures: Subject,
    settings: hiper.HiPerSettings,
    schedule: Schedule,
    anchor: Anchor | None,
    key: str,
    progress: Progress,
) -> Run:
    finished: list[Run] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        context, first, mask = detached([rows, start, pictures.mask])
        mask = None if mask is None else mask.to(x0.device)
        given = (denoiser, x0, context.to(x0.device), first, settings)
        if anchor is None:
            fit = hiper.HiPer(*given, mask)
        else:
            fit = AnchoredHiPer(*given, Anchor(**detached(asdict(anchor))), mask)

        def result() -> Result:
            return {"": fit.h.detach().cpu().clone()[None]}

        def on_update(denoised: Tensor) -> None:
            progress.update(fit.losses, denoised)

        header = {"method": METHOD, "settings": asdict(settings)}
        finished.append(train(fit, schedule.steps, schedule.save_every, result, run_store(), key, header, on_update))

    optimise(model, positive, pictures.latent, body)
    return finished[0]


def preview_pictures(
    model: Any,
    vae: Any,
    embedding: Embedding,
    source: Conditioning,
    target: Conditioning | None,
    negative: Conditioning | None,
    shape: tuple[int, ...],
    *,
    steps: int,
    cfg: float,
    seed: int,
) -> Tensor:
    """[source, h] for each saved step; with a target first [target], then [source, h] and [target, 0.8 h] in turn.

    All pictures start from the same noise. Shape [1, C, h, w] of the latent; returns [pictures, H, W, 3].
    """
    size = (1, *shape[1:])
    prompts = [] if target is None else [target]
    source = unmarked(source)  # the rows learned take the place of those that they started from
    for _, rows in sorted(embedding.rows.items()):
        prompts.append(apply_embedding(source, rows, 1.0))
        if target is not None:
            prompts.append(apply_embedding(target, rows, hiper.SCALE))
    return torch.cat(
        [sample_picture(model, vae, prompt, negative, size, steps=steps, cfg=cfg, seed=seed) for prompt in prompts]
    )
