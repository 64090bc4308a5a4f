"""Reference-guided sampling (HiFi Tuner, Algorithm 2) with a MODEL, and its replay in any sampler."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...denoiser import latent_mask
from ...fit.runs import digest
from ...fit.train import Result
from ...inversion.host.landing import Landing, attach_landing
from ...inversion.trajectory import Trajectory
from ...prompt.conditioning import TAIL, Conditioning, detached, single_prompt, warn_of_rate
from ...prompt.windows import windows
from ...session.describe import describe
from ...session.fingerprint import check_base, patches_digest, precision
from ...session.images import as_latent, checked_mask
from ...session.job import Fitted, Job, run
from ...session.sampling import noisy_start
from ...session.session import GuiderDenoiser, Session
from ...session.weights import warn_of_guidance
from ..guidance import Reference, ReferenceGuide, ReferenceSettings

LIMITS = ("area", "mask")
ALIGNED = "connect the mask of Align Reference, white only where the reference's subject is"
TIMES = ("start_percent", "end_percent")


@dataclass(frozen=True)
class ReferenceJob(Job):
    """One guided sampling. positive: the prompt as one plain entry; contexts: its tokens at each step. noise, mask and
    contexts are on the CPU. prompt_key: describe() of the connected prompt.
    """

    method: ClassVar[str] = "reference guide"

    model: Any
    positive: Conditioning
    contexts: list[Tensor]
    negative: Conditioning
    noise: Tensor
    trajectory: Trajectory
    mask: Tensor
    window: range
    settings: ReferenceSettings
    prompt_key: Any

    @property
    def steps(self) -> int:
        return len(self.window) * self.settings.inner_steps

    def key(self) -> str:
        model_parts = [patches_digest(self.model), precision(self.model), self.prompt_key, describe(self.negative)]
        path = [self.trajectory.latents, self.trajectory.sigmas]
        parts = [self.base, model_parts, self.noise, *path, self.mask, list(self.window)]
        return digest([self.method, asdict(self.settings), *parts])

    def session(self) -> Session:
        latent = self.model.get_model_object("latent_format").process_out(self.trajectory.latents[-1])
        return Session(self.model, self.positive, latent, negative=self.negative, exact=True)

    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        sampling = self.model.get_model_object("model_sampling")
        latent_format = self.model.get_model_object("latent_format")
        levels = self.trajectory.sigmas
        noise = noisy_start(sampling, self.noise, torch.zeros_like(self.noise), levels)
        parts = [noise, self.trajectory.latents, levels, self.negative[0][0], self.mask]
        start, latents, sigmas, null, mask = (detached(part).to(x0) for part in parts)
        contexts = [context.to(x0.device) for context in detached(self.contexts)]
        unguided = denoiser.of("negative")
        reference = Reference(latents, sigmas, mask, self.window)
        fit = ReferenceGuide(denoiser, start, reference, contexts, null, self.settings, unguided)
        if not self.steps:
            fit.advance()

        def result() -> Result:
            samples = latent_format.process_out(sampling.inverse_noise_scaling(sigmas[-1], fit.x)).cpu()
            return {"samples": samples, **({"nulls": torch.cat(fit.nulls).cpu()} if fit.nulls else {})}

        return fit, result


def sample_with_reference(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    noise: Any,
    trajectory: Trajectory,
    mask: Tensor,
    percents: tuple[float, float],
    settings: ReferenceSettings,
) -> tuple[Tensor, Any, Conditioning, list[float], str]:
    """Sample (or resume, or load from disk) an image along the noise levels of an inverted reference, which guides it
    with the subject that its mask [1, H, W] shows, between these percents of the sampling.

    Returns the image as in a LATENT, the model and negatives that reproduce it from the same noise, all losses, and a
    report. positive may have one entry per step; negative is the empty prompt; noise is a NOISE. ValueError, before any
    work, for inputs that do not fit together.
    """
    check_base(trajectory.header.get("base", {}), model)
    if trajectory.latents.shape[1] != 1:
        raise ValueError(
            f"The trajectory holds {trajectory.latents.shape[1]} images, a generation is guided by one reference: "
            "invert one image."
        )
    empty = single_prompt(negative, "negative prompt")
    if settings.cfg == 1.0 and settings.inner_steps:
        raise ValueError("With cfg 1 no negative prompt is looked at: set the cfg that the image is sampled with.")
    warn_of_guidance(model)
    if settings.inner_steps:
        warn_of_rate(settings.learning_rate, empty)
    sampling = model.get_model_object("model_sampling")
    window = guided_steps(trajectory.sigmas.tolist(), *percents, sampling.percent_to_sigma)
    cells = subject_cells(mask, trajectory.latents)
    prompt, contexts = plain_prompt(positive, trajectory.sigmas.tolist(), sampling.percent_to_sigma)
    start_noise = noise.generate_noise({"samples": torch.zeros_like(trajectory.latents[0])}).float().cpu()
    job = ReferenceJob(
        model, prompt, contexts, negative, start_noise, trajectory, cells, window, settings, describe(positive)
    )  # fmt: skip
    job_run = run(job)
    result = job_run.last
    target = trajectory.latents[window[0]]
    replay = attach_landing(model, Landing({window[0] - 1: target}, tuple(trajectory.sigmas.tolist()), cells))
    conditioning = masked_negative(negative, result.get("nulls"), cells, window, trajectory.sigmas.tolist(), sampling)
    losses, count = job_run.losses, len(job_run.losses) // len(window)
    lines = [f"guided in steps {window[0] + 1} to {window[-1] + 1} of {trajectory.steps}, {count} updates in each"]
    for index, step in enumerate(window if count else ()):
        of_step = losses[index * count : (index + 1) * count]
        lines.append(f"step {step + 1:3d}: loss {of_step[0]:.3g} to {of_step[-1]:.3g}")
    return result["samples"], replay, conditioning, losses, "\n".join(lines)


def guided_steps(sigmas: list[float], start: float, end: float, sigma_of: Callable[[float], float]) -> range:
    """The steps of sigmas [T + 1] within a part of the sampling; ValueError for none, or if it includes the first."""
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"The guidance would last from {start:g} to {end:g}: give a start below the end, within 0..1.")
    steps = [step for step, sigma in enumerate(sigmas[:-1]) if sigma_of(end) <= sigma <= sigma_of(start)]
    if not steps:
        raise ValueError(
            f"None of the {len(sigmas) - 1} sampling steps lies between {start:g} and {end:g}: widen the window, or "
            "invert with more steps."
        )
    if steps[0] == 0:
        raise ValueError(
            f"The guidance would begin at the very first step, with {start:g}: it needs a step before it, that the "
            "transplant is made in. Raise start_percent (0.21 is the paper's) or invert with more steps."
        )
    return range(steps[0], steps[-1] + 1)


def subject_cells(mask: Tensor, latents: Tensor) -> Tensor:
    """The reference subject's mask [1, 1, h, w] at the size of a trajectory's latents, ones and zeros."""
    rows, columns = latents.shape[-2:]
    mask = checked_mask(mask, 1, (rows, columns), empty=ALIGNED, full=ALIGNED)
    return as_latent(checked_mask(latent_mask(mask, rows, columns), 1, (rows, columns), full=ALIGNED)[None], latents[0])


def plain_prompt(
    positive: Conditioning, sigmas: list[float], sigma_of: Callable[[float], float]
) -> tuple[Conditioning, list[Tensor]]:
    """A prompt that may change from step to step, as one entry without a window, and its tokens at each step."""
    spans = [(sigma_of(each.get(TIMES[1], 1.0)), sigma_of(each.get(TIMES[0], 0.0))) for _, each in positive]
    entries_at = [  # as ComfyUI evaluates them
        [entry for entry, (low, high) in zip(positive, spans, strict=True) if low <= sigma <= high]
        for sigma in sigmas[:-1]
    ]
    for step, entries in enumerate(entries_at):
        if len(entries) != 1:
            raise ValueError(
                f"The prompt has {len(entries)} entries in step {step + 1} of {len(entries_at)}, expected one in "
                "each: connect a Text Encode node, or the output of Apply Subject Embedding, directly."
            )
    entries = [entry for (entry,) in entries_at]
    plain = [{name: value for name, value in options.items() if name not in (*TIMES, TAIL)} for _, options in entries]
    limited = sorted({name for options in plain for name in LIMITS if name in options})
    if limited:
        raise ValueError(f"The prompt is limited by {', '.join(limited)}: connect a prompt for the whole image.")
    first = digest(describe(plain[0]))
    if any(options is not plain[0] and digest(describe(options)) != first for options in plain):
        raise ValueError(
            "The prompt's entries differ in more than their rows (a pooled vector, a ControlNet): connect the output "
            "of Apply Subject Embedding directly."
        )
    rows = [single_prompt([[text, {}]], "prompt").detach().float().cpu() for text, _ in entries]
    return [[entries[0][0], plain[0]]], rows


def masked_negative(
    negative: Conditioning, nulls: Tensor | None, mask: Tensor, window: range, sigmas: list[float], sampling: Any
) -> Conditioning:
    """The empty prompt; in the window's steps it holds outside the mask, and each step's own tokens hold inside.

    nulls [W, n, d]; None if nothing was optimised.
    """
    (phi, options), times = negative[0], windows(sigmas, sampling.percent_to_sigma)
    begin, end = times[window[0]][0], times[window[-1]][1]
    if nulls is None:
        return [[phi, options.copy()]]

    def entry(rows: Tensor, start: float, stop: float, where: Tensor | None = None) -> list[Any]:
        mask_options = (
            {} if where is None else {"mask": where.flatten(0, -3), "mask_strength": 1.0, "set_area_to_bounds": False}
        )
        return [rows, {**options, "start_percent": start, "end_percent": stop, **mask_options}]

    entries = [entry(phi, 0.0, begin), entry(phi, begin, end, 1 - mask)]
    entries += [entry(rows, *times[step], mask) for step, rows in zip(window, nulls.split(1), strict=True)]
    return [*entries, entry(phi, end, 1.0)] if end < 1.0 else entries
