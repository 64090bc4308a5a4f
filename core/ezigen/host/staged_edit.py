"""EZIGen's editing with a MODEL: another subject in the masked area, the rest preserved by an inversion."""

from dataclasses import dataclass
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...denoiser import predicted_noise, rescaled
from ...fit.fit import step_generator
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.images import checked_mask
from ...session.inputs import check_width
from ...session.progress import Steps
from ...session.session import predicting
from ...vision.measures import resize_mask
from ..staged import EDIT_CFG, TOKEN, background_of, invert_with_solver, paste, published_levels, split
from .adapter import with_adapter, without_adapter
from .staged import SCHEDULER, SEEDS, Drawn, LoopImages, Stages, check_staged, crop_to_cells, levels, warn_of_size

WHITE = 1.0 - 1e-4  # a 1 after a mask was scaled; above 254 / 255


@dataclass(frozen=True)
class StagedEdit(Stages):
    """published: use a background two steps noisier than the image, and only the mask's pure white (see
    ezigen/staged.py). paste: finally restore the source's pixels outside the mask.
    """

    cfg: float = EDIT_CFG
    published: bool = False
    paste: bool = False
    inversion_prompt: Conditioning | None = None
    clip: Any | None = None

    def inverse(self) -> Conditioning:
        """The prompt that an image is inverted with: its own, or with a CLIP the reference code's, or the negative."""
        if self.clip is None:
            return self.negative if self.inversion_prompt is None else self.inversion_prompt
        if self.inversion_prompt is not None:
            raise ValueError(
                "A prompt for the inversion and a CLIP came in, expected one of them, as the CLIP stands for the "
                "reference code's prompt: disconnect 'clip' or 'inversion_prompt'."
            )
        published = published_prompt(self.clip)
        check_width("clip", published, self.model)
        return published


def published_prompt(clip: Any) -> Conditioning:
    """TF-ICON's "exceptional prompt": one token everywhere, and no positions. The encoder adds its positions to every
    embedding, so each token is given as an embedding from which its position's is subtracted.
    """
    tokens = clip.tokenize("")
    tables = [part for part in clip.cond_stage_model.modules() if hasattr(part, "position_embedding")]
    if len(tokens) != 1 or len(tables) != 1:
        raise ValueError(
            f"The text encoder on 'clip' has {len(tables)} tables of positions, expected one, as SD2.1's and SD1.x's "
            "have: connect another, or disconnect it to invert with the negative prompt."
        )
    clip.load_model()
    word, positions = (
        table.weight.detach().float().cpu() for table in (tables[0].token_embedding, tables[0].position_embedding)
    )
    return clip.encode_from_tokens_scheduled(
        {name: [[(row, 1.0) for row in word[TOKEN] - positions]] for name in tokens}
    )


def edit_staged(edit: StagedEdit, source: Tensor, mask: Tensor) -> Drawn:
    """Edit in stages. source [1, H, W, 3]; mask [1, H, W], white where the subject goes. The first of the images
    is the source.
    """
    model, vae, loops, inverse = edit.model, edit.vae, edit.loops, edit.inverse()
    if len(source) != 1 or len(mask) != 1:
        raise ValueError(f"{len(source)} images and {len(mask)} masks were given: edit one image at a time.")
    if not bool((mask > (WHITE if edit.published else 0.5)).any()):
        grey = " It is grey: as published only white counts." if bool((mask > 0.5).any()) else ""
        raise ValueError(f"The mask is empty: paint the place of the subject (white).{grey}")
    checked_mask(mask, 1, (source.shape[1], source.shape[2]), empty=None)
    check_staged(edit)
    warn_of_size(source)
    single_prompt(inverse, "prompt of the inversion")
    down = split(levels(model, SCHEDULER, edit.steps), edit.split_ratio)[1]
    table = model.get_model_object("model_sampling").sigmas.to(down)
    up = torch.cat([table[:1], down.flip(0)[1:]])  # the source counts as the lowest level: networks know no level 0
    if edit.published:
        up = published_levels(table, edit.steps)[: len(down)]
    mask = crop_to_cells(resize_mask(mask.cpu(), *source.shape[1:3])[..., None], vae)[..., 0]
    source = crop_to_cells(source[..., :3].float().cpu(), vae)
    plain, adapted = without_adapter(model), with_adapter(model, edit.adapter, edit.subject)
    steps = Steps(model, 2 * (len(down) - 1) * loops.most)
    images, backgrounds, loop, result = LoopImages(edit.vision, source), None, 0, None
    while loops.needs_another(loop, images.similarity):
        loop += 1
        latent = vae.encode(images[-1])
        start, latest = _invert(plain, inverse, latent, up, down, edit.published, steps)
        backgrounds = latest if backgrounds is None else backgrounds  # every loop pastes the source's own
        selected = (mask > WHITE).float() if edit.published else mask
        cells = resize_mask(selected, *start.shape[-2:])[:, None].to(start)
        sampler = _PastingSampler(backgrounds, cells, edit, loop, steps)
        zeros, seed, prompts = torch.zeros_like(start), edit.seed % SEEDS, (edit.positive, edit.negative)
        result = comfy.sample.sample_custom(
            adapted, start, edit.cfg, sampler, down, *prompts, zeros, disable_pbar=True, seed=seed
        ).cpu()
        images.add(vae.decode(result).cpu())
    image = images[-1]
    if edit.paste:
        image = paste(image, source.to(image), mask[..., None].to(image))
    latent = vae.encode(source).cpu() if result is None else result
    return image, torch.cat(images), {"samples": latent}, "\n".join(images.lines)


def _invert(
    model: Any, prompt: Conditioning, latent: Tensor, up: Tensor, down: Tensor, published: bool, steps: Steps
) -> tuple[Tensor, list[Tensor]]:
    """The starting latent and the trajectory for background_of(), in the model's latent space, on the CPU.

    Each pasted latent has the scale of the level that its step reaches, and its noise level too unless published.
    """

    def body(denoiser: Any, x0: Tensor) -> list[Tensor]:
        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            steps.step()
            return predicted_noise(denoiser, x, sigma, denoiser.context)

        sigmas = up.to(x0)
        start = rescaled(x0, torch.zeros_like(sigmas[0]), sigmas[0]) if published else x0
        return [x.cpu() for x in invert_with_solver(predict, start, sigmas)]

    latents = predicting(model, prompt, latent, body)
    if not published:
        return latents[-1], latents
    # As published, latents of variance 1 are used at the step after which they are pasted, two levels lower.
    to = [*down.flip(0)[:1], *down.flip(0)[:-1]]
    backgrounds = [rescaled(x, level, other) for x, level, other in zip(latents, up, to, strict=True)]
    return rescaled(latents[-1], up[-1], down[0]), backgrounds


class _PastingSampler(comfy.samplers.Sampler):
    """DDPM steps from the latent passed as noise; pastes the background after each step."""

    def __init__(self, backgrounds: list[Tensor], mask: Tensor, settings: StagedEdit, loop: int, steps: Steps) -> None:
        self.backgrounds, self.mask, self.settings, self.steps = backgrounds, mask, settings, steps
        self.generator = step_generator(settings.seed, loop, "staged edit")

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *_more, **_named):
        x, mask = noise, self.mask.to(noise)

        def draw(*_levels: Tensor) -> Tensor:
            return torch.randn(noise.shape, generator=self.generator).to(noise)

        for step in range(len(sigmas) - 1):
            mm.throw_exception_if_processing_interrupted()
            two = sigmas[step : step + 2]
            x = comfy.k_diffusion.sampling.sample_ddpm(model_wrap, x, two, extra_args, disable=True, noise_sampler=draw)
            x = paste(x, background_of(self.backgrounds, step, self.settings.published).to(x), mask)
            self.steps.step()
        return x
