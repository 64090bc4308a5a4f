"""EZIGen's decoupled sampling with a MODEL: layout, appearance, and loops until two pictures in a row are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter_file import StoredAdapter
from ..conditioning import Conditioning
from ..staged_sampling import CFG, SPLIT_RATIO, STEPS, TIMESTEPS, Loops, published_factors, split
from .adapter import Subject, with_adapter
from .vision import embed

SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"  # together the published steps
SEEDS = 2**63  # newer ComfyUI's samplers add to a seed, and the largest one overflows
SAMPLERS, SCHEDULERS = tuple(comfy.samplers.SAMPLER_NAMES), tuple(comfy.samplers.SCHEDULER_NAMES)


@dataclass(frozen=True)
class StagedSettings:
    """What decides the pictures, next to model, subject and prompts. keep_best: of all loops the picture that is most
    like the subject, instead of the last one. published_level: see core/staged_sampling.py.
    """

    seed: int = 0
    steps: int = STEPS
    cfg: float = CFG
    split_ratio: float = SPLIT_RATIO
    loops: Loops = Loops()
    sampler: str = SAMPLER
    scheduler: str = SCHEDULER
    strength: float = 1.0
    published_level: bool = False
    keep_best: bool = False


@dataclass(frozen=True)
class Prompts:
    """positive; negative of the first sampling; negative of the loops, which is empty as published."""

    positive: Conditioning
    negative: Conditioning
    loop_negative: Conditioning


@dataclass(frozen=True)
class Staged:
    """latent [B, C, h, w] as in a LATENT, and its picture; pictures: of the first sampling and of every loop."""

    latent: Tensor
    picture: Tensor
    pictures: Tensor
    report: str


def levels(model: Any, settings: StagedSettings) -> Tensor:
    """The noise levels of the whole sampling. ValueError for a number of steps that the scheduler does not give."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, settings.scheduler, settings.steps)
    if len(sigmas) - 1 != settings.steps:
        raise ValueError(
            f"The scheduler {settings.scheduler} makes {len(sigmas) - 1} steps when asked for {settings.steps}: ask "
            "for a divisor of 1000 (20, 25, 40, 50), or take another scheduler."
        )
    return sigmas


def staged(
    model: Any,
    vae: Any,
    adapter: StoredAdapter,
    subject: Subject,
    prompts: Prompts,
    latent: Tensor,
    settings: StagedSettings,
    vision: Any | None = None,
    start: Tensor | None = None,
    node_id: str | None = None,
) -> Staged:
    """latent [B, C, h, w]: its size alone counts. start [B, H, W, 3]: a picture to begin the loops with, of any model,
    instead of a first sampling. vision: a CLIP_VISION that says when two pictures are alike, or which is best.
    """
    loops, seed = settings.loops, settings.seed
    if vision is None and (loops.least != loops.most or settings.keep_best):
        raise ValueError(
            f"Without a vision model nothing says when to stop between {loops.least} and {loops.most} loops, or which "
            "picture is best: connect a CLIP_VISION, or set both numbers the same and keep the last picture."
        )
    sigmas = levels(model, settings)
    layout, appearance = split(sigmas, settings.split_ratio)
    first, later = (
        with_adapter(model, adapter, subject, ratio, settings.strength) for ratio in (settings.split_ratio, 1.0)
    )
    show = _Steps(model, len(sigmas) - 1 + loops.most * (len(appearance) - 1), node_id)
    if start is None:
        noise = stock_noise(latent, seed)
        found = show.sample(first, noise, sigmas, prompts.negative, prompts, 0 * latent, settings, seed % SEEDS)
        pictures = [vae.decode(found)]
    else:
        pictures = [whole_cells(start[..., :3].float(), vae)]
        found = vae.encode(pictures[0])
    told, similarity, done = [], 0.0, 0
    latents, looks = [found], Looks(vision, pictures[0])
    while loops.go_on(done, similarity):
        done += 1
        z = found if done == 1 and start is not None else vae.encode(pictures[-1])
        noise, of_loop = stock_noise(latents[-1], seed, done), (seed + done) % SEEDS
        if settings.published_level:
            signal, more = _published(model, settings.split_ratio, appearance[0])
            z, noise = signal * z, more * noise
        found = show.sample(later, noise, appearance, prompts.loop_negative, prompts, z, settings, of_loop)
        latents.append(found)
        pictures.append(vae.decode(found))
        similarity = looks.at(pictures[-1])
        told.append(f"loop {done}" + ("" if vision is None else f": {similarity:.4f} like the one before"))
    chosen = _best(looks, subject, told) if settings.keep_best else len(pictures) - 1
    told.append(f"{settings.steps if start is None else 0} steps and {done} times {len(appearance) - 1}")
    return Staged(latents[chosen], pictures[chosen], torch.cat(pictures), "\n".join(told))


def whole_cells(picture: Tensor, vae: Any) -> Tensor:
    """[B, H, W, C] without the last pixels that make no whole cell of a latent."""
    side = vae.spacial_compression_encode()
    height, width = (length // side * side for length in picture.shape[1:3])
    return picture[:, :height, :width]


def _published(model: Any, split_ratio: float, first: Tensor) -> tuple[float, float]:
    table = model.get_model_object("model_sampling").sigmas
    timestep = min(round(split_ratio * TIMESTEPS), len(table) - 1)
    return published_factors(float(first), float(table[timestep]))


def stock_noise(like: Tensor, seed: int, loop: int = 0) -> Tensor:
    """What ComfyUI's samplers draw for the seed; a loop's is the seed and its number, so that stock nodes can do it."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed((seed + loop) % SEEDS))


class Looks:
    """What a vision model, if there is one, sees in pictures [B, H, W, 3] that come in a row; it sees each once."""

    def __init__(self, vision: Any | None, first: Tensor) -> None:
        self.vision = vision
        self.seen = [] if vision is None else [embed(vision, first)]

    def at(self, picture: Tensor) -> float:
        """How alike it is to the one before; of a batch, those that are least alike count."""
        if self.vision is None:
            return 0.0
        self.seen.append(embed(self.vision, picture))
        return float(F.cosine_similarity(self.seen[-2], self.seen[-1]).min())


def _best(looks: Looks, subject: Subject, told: list[str]) -> int:
    """The number of the picture that is most like the subject's, and a line about it."""
    wanted = F.normalize(embed(looks.vision, subject.pictures), dim=1)
    scores = [float((F.normalize(seen, dim=1) @ wanted.T).mean()) for seen in looks.seen]
    best = max(range(len(scores)), key=scores.__getitem__)
    told.append(f"best: picture {best} (0 is the first sampling), {scores[best]:.4f} like the subject")
    return best


class _Steps:
    """Samplings in a row, with one progress bar for all."""

    def __init__(self, model: Any, total: int, node_id: str | None) -> None:
        self.bar, self.total, self.done = comfy.utils.ProgressBar(total, node_id=node_id), total, 0
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def _told(self) -> Callable[..., None]:
        def callback(_step: int, denoised: Tensor, _x: Tensor, _total: int) -> None:
            mm.throw_exception_if_processing_interrupted()
            self.done += 1
            picture = None
            if self.previewer is not None:
                picture = self.previewer.decode_latent_to_preview_image("JPEG", denoised[:1])
            self.bar.update_absolute(self.done, self.total, picture)

        return callback

    def sample(
        self,
        model: Any,
        noise: Tensor,
        sigmas: Tensor,
        negative: Conditioning,
        prompts: Prompts,
        latent: Tensor,
        settings: StagedSettings,
        seed: int,
    ) -> Tensor:
        """A stock sampling; latents as in a LATENT."""
        sampler = comfy.samplers.sampler_object(settings.sampler)
        return comfy.sample.sample_custom(
            model, noise, settings.cfg, sampler, sigmas, prompts.positive, negative, latent, callback=self._told(),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
