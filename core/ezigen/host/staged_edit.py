"""EZIGen's editing with a MODEL: in a masked place of an image another subject, the rest held by an inversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...denoiser import predicted_noise, rescaled
from ...fit.fit import step_generator
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.images import check_vae, checked_mask
from ...session.progress import Steps
from ...session.session import predicting
from ...vision.measures import resize_mask
from ..staged import (
    EDIT_CFG,
    SPLIT_RATIO,
    STEPS,
    Loops,
    background_of,
    inverted_by_solver,
    pasted,
    published_levels,
    split,
)
from .adapter import Subject, with_adapter, without_adapter
from .staged import SEEDS, Looks, StagedModels, StagedSettings, levels, warn_of_size, whole_cells

WHITE = 1.0 - 1e-4  # what is left of 1 when a mask was scaled, short of 254 of 255


@dataclass(frozen=True)
class EditSettings:
    """What decides the edit. published: the background two steps noisier than the image, and the mask's pure white
    alone (see ezigen/staged.py). paste: outside of the mask the source's own pixels in the end.
    """

    seed: int = 0
    steps: int = STEPS
    cfg: float = EDIT_CFG
    split_ratio: float = SPLIT_RATIO
    loops: Loops = Loops()
    published: bool = False
    paste: bool = False


@dataclass(frozen=True)
class Edited:
    """latent [1, C, h, w] as in a LATENT, its image, the images of all loops with the source first."""

    latent: Tensor
    image: Tensor
    images: Tensor
    report: str


@dataclass(frozen=True)
class EditPrompts:
    """positive and negative of the sampling; inverse: what the source is walked up with, the empty prompt."""

    positive: Conditioning
    negative: Conditioning
    inverse: Conditioning


def edited(
    models: StagedModels,
    subject: Subject,
    prompts: EditPrompts,
    source: Tensor,
    mask: Tensor,
    settings: EditSettings,
    node_id: str | None = None,
) -> Edited:
    """source [1, H, W, 3]; mask [1, H, W], white where the subject goes."""
    model, vae, vision, loops = models.model, models.vae, models.vision, settings.loops
    _check(source, mask, vision, settings)
    check_vae(model, vae)
    warn_of_size(source)
    single_prompt(prompts.inverse, "prompt of the inversion")
    down = split(levels(model, StagedSettings(steps=settings.steps)), settings.split_ratio)[1]
    table = model.get_model_object("model_sampling").sigmas.to(down)
    up = published_levels(table, settings.steps)[: len(down)] if settings.published else _reversed(down, table[:1])
    mask = whole_cells(resize_mask(mask.cpu(), *source.shape[1:3])[..., None], vae)[..., 0]
    source = whole_cells(source[..., :3].float().cpu(), vae)
    plain, adapted = without_adapter(model), with_adapter(model, models.adapter, subject)
    steps = Steps(model, 2 * (len(down) - 1) * loops.most, node_id)
    images, kept, similarity, done, found = [source], None, 0.0, 0, None
    told, looks = [], Looks(vision, source)
    while loops.go_on(done, similarity):
        done += 1
        latent = vae.encode(images[-1])
        start, backgrounds = _inverted(plain, prompts.inverse, latent, up, down, settings.published, steps)
        kept = backgrounds if kept is None else kept  # those of every loop are the source's own
        run = _Pasting(kept, _latent_mask(mask, settings.published, start), settings, done, steps)
        found = _sampled(adapted, prompts, run, start, down, settings.cfg)
        images.append(vae.decode(found).cpu())
        similarity = looks.at(images[-1])
        told.append(f"loop {done}" + ("" if vision is None else f": {similarity:.4f} like the one before"))
    image = images[-1]
    if settings.paste:
        image = _pasted_pixels(image, source, mask)
    return Edited(vae.encode(source).cpu() if found is None else found, image, torch.cat(images), "\n".join(told))


def _check(source: Tensor, mask: Tensor, vision: Any | None, settings: EditSettings) -> None:
    loops = settings.loops
    if len(source) != 1 or len(mask) != 1:
        raise ValueError(f"{len(source)} images and {len(mask)} masks were given: edit one image at a time.")
    if not bool((mask > (WHITE if settings.published else 0.5)).any()):
        grey = " It is grey: as published only white counts." if bool((mask > 0.5).any()) else ""
        raise ValueError(f"The mask is empty: paint the place of the subject (white).{grey}")
    checked_mask(mask, 1, (source.shape[1], source.shape[2]), empty=None)
    if vision is None and loops.least != loops.most:
        raise ValueError(
            f"Without a vision model nothing says when to stop between {loops.least} and {loops.most} loops: connect a "
            "CLIP_VISION, or set both numbers the same."
        )


def _reversed(down: Tensor, lowest: Tensor) -> Tensor:
    """The levels of the steps upwards; a network knows no clean image, so the source counts as of its lowest."""
    return torch.cat([lowest, down.flip(0)[1:]])


def _latent_mask(mask: Tensor, published: bool, like: Tensor) -> Tensor:
    chosen = (mask > WHITE).float() if published else mask.float()
    return resize_mask(chosen, like.shape[-2], like.shape[-1])[:, None].to(like)


def _pasted_pixels(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    part = mask[..., None].to(image)
    return part * image + (1 - part) * source.to(image)


def _inverted(
    model: Any, prompt: Conditioning, latent: Tensor, up: Tensor, down: Tensor, published: bool, steps: Steps
) -> tuple[Tensor, list[Tensor]]:
    """Where the steps start, and what background_of() takes; latents in the model's space, on the CPU.

    What is pasted is in the scale of the level that its step comes to, and of that very level unless published.
    """
    found: list[Tensor] = []

    def body(denoiser: Any, x0: Tensor) -> None:
        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            return predicted_noise(denoiser, x, sigma, denoiser.context)

        sigmas = up.to(x0)
        start = rescaled(x0, torch.zeros_like(sigmas[0]), sigmas[0]) if published else x0
        found.extend(x.cpu() for x in inverted_by_solver(predict, start, sigmas, lambda _step: steps.step()))

    predicting(model, prompt, latent, body)
    if not published:
        return found[-1], found
    # Latents of variance 1 are taken for those of the step that they are pasted behind, two levels lower.
    to = [*down.flip(0)[:1], *down.flip(0)[:-1]]
    shown = [rescaled(x, level, other) for x, level, other in zip(found, up, to, strict=True)]
    return rescaled(found[-1], up[-1], down[0]), shown


class _Pasting(comfy.samplers.Sampler):
    """DDPM steps from the latent that is given as noise; behind each the background is pasted."""

    def __init__(self, kept: list[Tensor], mask: Tensor, settings: EditSettings, loop: int, steps: Steps) -> None:
        self.kept, self.mask, self.settings, self.steps = kept, mask, settings, steps
        self.generator = step_generator(settings.seed, loop, "staged edit")

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        x, mask = noise, self.mask.to(noise)
        for step in range(len(sigmas) - 1):
            mm.throw_exception_if_processing_interrupted()
            x = comfy.k_diffusion.sampling.sample_ddpm(
                model_wrap,
                x,
                sigmas[step : step + 2],
                extra_args=extra_args,
                disable=True,
                noise_sampler=self._noise(x),
            )
            x = pasted(x, background_of(self.kept, step, self.settings.published).to(x), mask)
            self.steps.step()
        return x

    def _noise(self, like: Tensor) -> Callable[..., Tensor]:
        return lambda *_levels: torch.randn(like.shape, generator=self.generator).to(like)


def _sampled(model: Any, prompts: EditPrompts, run: _Pasting, start: Tensor, down: Tensor, cfg: float) -> Tensor:
    """A latent as in a LATENT, from one in the model's own space at the first of the levels."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts.positive, prompts.negative)
    guider.set_cfg(cfg)
    seed = run.settings.seed % SEEDS
    return guider.sample(start, torch.zeros_like(start), run, down, disable_pbar=True, seed=seed).cpu()
