"""EZIGen's decoupled sampling with a MODEL: layout, appearance, and loops until two consecutive images are similar."""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from ...prompt.conditioning import Conditioning, warn_of_no_words
from ...session.images import check_vae
from ...session.progress import Steps
from ...vision.host.vision import embed
from ..artifact import StoredAdapter
from ..staged import CFG, SPLIT_RATIO, STEPS, TIMESTEPS, Loops, published_factors, split
from .adapter import Subject, with_adapter, with_ratio

SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"  # together the published steps
SEEDS = 2**63  # newer ComfyUI's samplers add to a seed, which overflows for the largest one
# On the CPU a sampler draws its step noise like the noise of a latent. With one seed for both, the first step would add
# the noise that is already there, and the latent would have a quarter more noise than its level.
STEP_SEEDS = 1000
LARGE = 1024  # pixels of an image's short side; larger images exceed what the models of these adapters can draw
SAMPLERS, SCHEDULERS = tuple(comfy.samplers.SAMPLER_NAMES), tuple(comfy.samplers.SCHEDULER_NAMES)
Drawn = tuple[Tensor, Tensor, dict[str, Tensor], str]
"""The image, those of the first sampling (or the source) and of every loop, the image's LATENT, and a report."""
log = logging.getLogger("likeness")


@dataclass(frozen=True)
class Stages:
    """What determines the images of a sampling or an edit, besides its size, start or source. vision: a CLIP_VISION
    that compares images, to stop the loops or to find the best one.
    """

    model: Any
    vae: Any
    adapter: StoredAdapter
    subject: Subject
    positive: Conditioning
    negative: Conditioning
    vision: Any | None = None
    seed: int = 0
    steps: int = STEPS
    cfg: float = CFG
    split_ratio: float = SPLIT_RATIO
    loops: Loops = Loops()


@dataclass(frozen=True)
class StagedSampling(Stages):
    """loop_negative: the negative prompt of the loops, empty as published; None for that of the first sampling.
    keep_best: return the image of all loops that is most similar to the subject, instead of the last one.
    published_level: see ezigen/staged.py.
    """

    loop_negative: Conditioning | None = None
    sampler: str = SAMPLER
    scheduler: str = SCHEDULER
    published_level: bool = False
    keep_best: bool = False


def levels(model: Any, scheduler: str, steps: int) -> Tensor:
    """The noise levels of the whole sampling. ValueError for a number of steps that the scheduler cannot produce."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    if len(sigmas) - 1 != steps:
        raise ValueError(
            f"The scheduler {scheduler} makes {len(sigmas) - 1} steps when asked for {steps}: ask for a divisor of "
            "1000 (20, 25, 40, 50), or take another scheduler."
        )
    return sigmas


def sample_staged(stages: StagedSampling, latent: Tensor, start: Tensor | None = None) -> Drawn:
    """Sample in stages. latent [B, any, h, w]: only its size is used. start [B, H, W, 3]: an image from any model that
    replaces the first sampling.
    """
    model, vae, loops, seed = stages.model, stages.vae, stages.loops, stages.seed
    check_staged(stages)
    if start is not None:
        warn_of_size(start)
    sigmas = levels(model, stages.scheduler, stages.steps)
    _, appearance = split(sigmas, stages.split_ratio)
    adapted = with_adapter(model, stages.adapter, stages.subject)
    split_model = with_ratio(adapted, stages.split_ratio)
    steps = Steps(model, len(sigmas) - 1 + loops.most * (len(appearance) - 1))
    sampler = comfy.samplers.sampler_object(stages.sampler)
    stock: dict[str, Any] = {"callback": lambda *now: steps.step(now[1]), "positive": stages.positive}
    stock |= {"cfg": stages.cfg, "sampler": sampler, "disable_pbar": True}
    sample = functools.partial(comfy.sample.sample_custom, **stock)
    if start is None:
        latent = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(latent))
        noise = stock_noise(latent, seed)  # step noise as in a stock sampler, for the same layout
        inputs = {"negative": stages.negative, "latent_image": latent, "seed": seed % SEEDS}
        result = sample(split_model, noise, sigmas=sigmas, **inputs)
        images = LoopImages(stages.vision, vae.decode(result).cpu())
    else:
        images = LoopImages(stages.vision, crop_to_cells(start[..., :3].float().cpu(), vae))
        result = vae.encode(images[0]).cpu()
    latents, loop = [result], 0
    loop_negative = stages.negative if stages.loop_negative is None else stages.loop_negative
    while loops.needs_another(loop, images.similarity):
        loop += 1
        z = result if loop == 1 and start is not None else vae.encode(images[-1]).cpu()
        noise = stock_noise(latents[-1], seed, loop)
        if stages.published_level:
            table = model.get_model_object("model_sampling").sigmas
            level = table[min(round(stages.split_ratio * TIMESTEPS), len(table) - 1)]
            signal, noise_factor = published_factors(float(appearance[0]), float(level))
            z, noise = signal * z, noise_factor * noise
        # Bit-identical to the stock node Add Noise.
        z = model.get_model_object("process_latent_in")(z)
        x = model.get_model_object("model_sampling").noise_scaling(appearance[0], noise, z)
        x = model.get_model_object("process_latent_out")(x)
        inputs = {"negative": loop_negative, "latent_image": x, "seed": (seed + loop + STEP_SEEDS) % SEEDS}
        result = sample(adapted, torch.zeros_like(x), sigmas=appearance, **inputs)
        latents.append(result)
        images.add(vae.decode(result).cpu())
    index = images.best(stages.subject.images) if stages.keep_best else loop
    images.lines.append(f"{stages.steps if start is None else 0} steps and {loop} times {len(appearance) - 1}")
    return images[index], torch.cat(images), {"samples": latents[index]}, "\n".join(images.lines)


def check_staged(stages: Stages) -> None:
    """ValueError for a VAE of another model, or numbers of loops that need a vision model where there is none."""
    loops, best = stages.loops, getattr(stages, "keep_best", False)
    if stages.vision is None and (loops.least != loops.most or best):
        which, keep = (", or which image is best", " and keep the last image") if best else ("", "")
        raise ValueError(
            f"Without a vision model nothing says when to stop between {loops.least} and {loops.most} loops{which}: "
            f"connect a CLIP_VISION, or set both numbers the same{keep}."
        )
    check_vae(stages.model, stages.vae)
    if stages.cfg != 1.0:
        warn_of_no_words(stages.positive, stages.negative)


def warn_of_size(image: Tensor) -> None:
    """Warn when an image [B, H, W, C] is far larger than the models can draw."""
    height, width = image.shape[1:3]
    if min(height, width) > LARGE:
        log.warning(
            "The image has %d x %d pixels and is sampled at that size: more than SD2.1-base and SD1.x can draw, and "
            "it takes very much memory. Scale it down first, to 512 on its short side.",
            width,
            height,
        )


def crop_to_cells(image: Tensor, vae: Any) -> Tensor:
    """[B, H, W, C] cropped to a multiple of the latent's cell size."""
    side = vae.spacial_compression_encode()
    height, width = (length // side * side for length in image.shape[1:3])
    return image[:, :height, :width]


def stock_noise(like: Tensor, seed: int, loop: int = 0) -> Tensor:
    """ComfyUI's noise for a seed; a loop uses seed + loop, so that stock nodes can reproduce it."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed((seed + loop) % SEEDS))


class LoopImages(list[Tensor]):
    """The first image [B, H, W, 3] and that of every loop, each compared with the one before if there is a vision
    model, which embeds it once. lines: a report.
    """

    def __init__(self, vision: Any | None, first: Tensor) -> None:
        super().__init__([first])
        self.vision, self.similarity, self.lines = vision, 0.0, list[str]()
        self.embeddings = [] if vision is None else [embed(vision, first)]

    def add(self, image: Tensor) -> None:
        """The image of another loop. In a batch, the minimum over its images counts."""
        line = f"loop {len(self)}"
        self.append(image)
        if self.vision is not None:
            self.embeddings.append(embed(self.vision, image))
            before, now = self.embeddings[-2:]
            self.similarity = float(F.cosine_similarity(before, now).min())
            line += f": {self.similarity:.4f} like the one before"
        self.lines.append(line)

    def best(self, subject: Tensor) -> int:
        """The index of the image most similar to the subject's."""
        target = F.normalize(embed(self.vision, subject), dim=1)
        scores = [float((F.normalize(embedding, dim=1) @ target.T).mean()) for embedding in self.embeddings]
        best = max(range(len(scores)), key=scores.__getitem__)
        self.lines.append(f"best: image {best} (0 is the first sampling), {scores[best]:.4f} like the subject")
        return best
