"""EZIGen's decoupled sampling with a MODEL: layout, appearance, and loops until two images in a row are alike."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...prompt.conditioning import Conditioning
from ...session.images import check_vae
from ...session.progress import Steps
from ...vision.host.vision import embed
from ..artifact import StoredAdapter
from ..staged import CFG, SPLIT_RATIO, STEPS, TIMESTEPS, Loops, published_factors, split
from .adapter import Subject, with_adapter, with_ratio

SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"  # together the published steps
SEEDS = 2**63  # newer ComfyUI's samplers add to a seed, and the largest one overflows
# On the CPU a sampler's own noise is drawn like what a latent is noised with: with one seed for both, the first step
# would add the very noise that is there already, and the latent would have a quarter more of it than its level.
STEP_SEEDS = 1000
LARGE = 1024  # pixels of an image's short side, above which the models of these adapters have not enough to see
SAMPLERS, SCHEDULERS = tuple(comfy.samplers.SAMPLER_NAMES), tuple(comfy.samplers.SCHEDULER_NAMES)
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class StagedSettings:
    """What decides the images, next to model, subject and prompts. keep_best: of all loops the image that is most
    like the subject, instead of the last one. published_level: see ezigen/staged.py.
    """

    seed: int = 0
    steps: int = STEPS
    cfg: float = CFG
    split_ratio: float = SPLIT_RATIO
    loops: Loops = Loops()
    sampler: str = SAMPLER
    scheduler: str = SCHEDULER
    published_level: bool = False
    keep_best: bool = False


@dataclass(frozen=True)
class StagedModels:
    """What samples in stages: a MODEL with its VAE and an adapter. vision: a CLIP_VISION that says when two images are
    alike, or which is best.
    """

    model: Any
    vae: Any
    adapter: StoredAdapter
    vision: Any | None = None


@dataclass(frozen=True)
class Prompts:
    """positive; negative of the first sampling; negative of the loops, which is empty as published."""

    positive: Conditioning
    negative: Conditioning
    loop_negative: Conditioning


@dataclass(frozen=True)
class Staged:
    """latent [B, C, h, w] as in a LATENT, and its image; images: of the first sampling and of every loop."""

    latent: Tensor
    image: Tensor
    images: Tensor
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
    models: StagedModels,
    subject: Subject,
    prompts: Prompts,
    latent: Tensor,
    settings: StagedSettings,
    start: Tensor | None = None,
    node_id: str | None = None,
) -> Staged:
    """latent [B, any, h, w]: its size alone counts. start [B, H, W, 3]: an image to begin the loops with, of any
    model, instead of a first sampling.
    """
    model, vae, vision = models.model, models.vae, models.vision
    loops, seed = settings.loops, settings.seed
    _check(models, settings, start)
    sigmas = levels(model, settings)
    _, appearance = split(sigmas, settings.split_ratio)
    later = with_adapter(model, models.adapter, subject)
    first = with_ratio(later, settings.split_ratio)
    steps = Steps(model, len(sigmas) - 1 + loops.most * (len(appearance) - 1), node_id)
    sampler = _StockSampling(prompts.positive, settings, steps)
    if start is None:
        latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(latent))
        noise = stock_noise(latent, seed)  # and its steps' noise as a stock sampler draws it, for the same layout
        found = sampler.sample(first, noise, sigmas, prompts.negative, latent, seed % SEEDS)
        images = [vae.decode(found).cpu()]
    else:
        images = [whole_cells(start[..., :3].float().cpu(), vae)]
        found = vae.encode(images[0]).cpu()
    told, similarity, done = [], 0.0, 0
    latents, looks = [found], Looks(vision, images[0])
    while loops.go_on(done, similarity):
        done += 1
        z = found if done == 1 and start is not None else vae.encode(images[-1]).cpu()
        noise = stock_noise(latents[-1], seed, done)
        if settings.published_level:
            signal, more = _published(model, settings.split_ratio, appearance[0])
            z, noise = signal * z, more * noise
        x, of_steps = noised(model, z, noise, appearance[0]), (seed + done + STEP_SEEDS) % SEEDS
        nothing = torch.zeros_like(x)
        found = sampler.sample(later, nothing, appearance, prompts.loop_negative, x, of_steps)
        latents.append(found)
        images.append(vae.decode(found).cpu())
        similarity = looks.at(images[-1])
        told.append(f"loop {done}" + ("" if vision is None else f": {similarity:.4f} like the one before"))
    chosen = _best(looks, subject, told) if settings.keep_best else len(images) - 1
    told.append(f"{settings.steps if start is None else 0} steps and {done} times {len(appearance) - 1}")
    return Staged(latents[chosen], images[chosen], torch.cat(images), "\n".join(told))


def _check(models: StagedModels, settings: StagedSettings, start: Tensor | None) -> None:
    """Refuse what cannot work before anything runs."""
    loops = settings.loops
    if models.vision is None and (loops.least != loops.most or settings.keep_best):
        raise ValueError(
            f"Without a vision model nothing says when to stop between {loops.least} and {loops.most} loops, or which "
            "image is best: connect a CLIP_VISION, or set both numbers the same and keep the last image."
        )
    check_vae(models.model, models.vae)
    if start is not None:
        warn_of_size(start)


def warn_of_size(image: Tensor) -> None:
    """Say when an image [B, H, W, C] is far larger than what the models draw."""
    height, width = image.shape[1:3]
    if min(height, width) > LARGE:
        log.warning(
            "The image has %d x %d pixels and is sampled at that size: more than SD2.1-base and SD1.x can draw, and "
            "it takes very much memory. Scale it down first, to 512 on its short side.",
            width,
            height,
        )


def noised(model: Any, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """A latent at the noise level sigma, both as in a LATENT; to the last bit what the stock node Add Noise gives."""
    inside = model.get_model_object("process_latent_in")(latent)
    x = model.get_model_object("model_sampling").noise_scaling(sigma, noise, inside)
    return model.get_model_object("process_latent_out")(x)


def whole_cells(image: Tensor, vae: Any) -> Tensor:
    """[B, H, W, C] without the last pixels that make no whole cell of a latent."""
    side = vae.spacial_compression_encode()
    height, width = (length // side * side for length in image.shape[1:3])
    return image[:, :height, :width]


def _published(model: Any, split_ratio: float, first: Tensor) -> tuple[float, float]:
    table = model.get_model_object("model_sampling").sigmas
    timestep = min(round(split_ratio * TIMESTEPS), len(table) - 1)
    return published_factors(float(first), float(table[timestep]))


def stock_noise(like: Tensor, seed: int, loop: int = 0) -> Tensor:
    """What ComfyUI's nodes draw for the seed; a loop's is the seed and its number, so that stock nodes can do it."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed((seed + loop) % SEEDS))


class Looks:
    """What a vision model, if there is one, sees in images [B, H, W, 3] that come in a row; it sees each once."""

    def __init__(self, vision: Any | None, first: Tensor) -> None:
        self.vision = vision
        self.seen = [] if vision is None else [embed(vision, first)]

    def at(self, image: Tensor) -> float:
        """How alike it is to the one before; of a batch, those that are least alike count."""
        if self.vision is None:
            return 0.0
        self.seen.append(embed(self.vision, image))
        return float(F.cosine_similarity(self.seen[-2], self.seen[-1]).min())


def _best(looks: Looks, subject: Subject, told: list[str]) -> int:
    """The number of the image that is most like the subject's, and a line about it."""
    wanted = F.normalize(embed(looks.vision, subject.images), dim=1)
    scores = [float((F.normalize(seen, dim=1) @ wanted.T).mean()) for seen in looks.seen]
    best = max(range(len(scores)), key=scores.__getitem__)
    told.append(f"best: image {best} (0 is the first sampling), {scores[best]:.4f} like the subject")
    return best


@dataclass(frozen=True)
class _StockSampling:
    """Stock samplings in a row, with one progress bar for all."""

    positive: Conditioning
    settings: StagedSettings
    steps: Steps

    def sample(
        self, model: Any, noise: Tensor, sigmas: Tensor, negative: Conditioning, latent: Tensor, seed: int
    ) -> Tensor:
        """Latents as in a LATENT."""
        sampler = comfy.samplers.sampler_object(self.settings.sampler)
        return comfy.sample.sample_custom(
            model, noise, self.settings.cfg, sampler, sigmas, self.positive, negative, latent,
            callback=self.steps.callback, disable_pbar=True, seed=seed,
        )  # fmt: skip
