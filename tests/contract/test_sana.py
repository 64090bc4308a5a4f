"""Sana of a diffusers folder as ComfyUI's own MODEL, CLIP and VAE, against diffusers' own pipeline."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from .. import tiny_sana
from ..unit.vision.models import clip_folder
from .test_contract import own_user_folder  # noqa: F401  (a fixture)

PROMPT, NEGATIVE = "A photo of a Dog ", ""
STEPS, CFG, SEED = 4, 4.5, 3
SHAPE = (1, tiny_sana.CHANNELS, 2, 4)  # a picture of 128 x 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sana.write(tmp_path_factory.mktemp("diffusers") / "sana")


@pytest.fixture(scope="module")
def loaded(folder):
    from likeness.core.host.sana import load_sana

    with torch.inference_mode():  # as a node does
        return load_sana(folder)


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import SanaPipeline

    with torch.inference_mode(False):
        found = SanaPipeline.from_pretrained(str(folder), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def prompts(loaded, positive: str = PROMPT, negative: str = NEGATIVE):
    with torch.inference_mode():
        encoded = [
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for clip, text in ((loaded.clip, positive), (loaded.plain_clip, negative))
        ]
    return encoded


def noise(shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def reference(pipeline, prompt: str = PROMPT, negative: str = NEGATIVE, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture [1, H, W, 3] of diffusers' pipeline, and the noise levels that it took."""
    picture = pipeline(
        prompt,
        negative,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        height=SHAPE[2] * 32,
        width=SHAPE[3] * 32,
        latents=noise(),
        output_type="pt",
        use_resolution_binning=False,
        **changes,
    ).images
    return picture.movedim(1, -1), pipeline.scheduler.sigmas.clone()


def sampled(model, vae, positive, negative, sigmas, latent=None) -> torch.Tensor:
    """What stock sampling and decoding make."""
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros(1, 64, *SHAPE[2:]) if latent is None else latent  # as Empty HunyuanImage Latent makes it
    with torch.inference_mode():
        latent = comfy.sample.fix_empty_latent_channels(model, latent)
        samples = comfy.sample.sample_custom(
            model,
            noise(),
            CFG,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=SEED,
        )
        return vae.decode(samples)


def test_the_picture_is_the_one_of_diffusers_pipeline(loaded, pipeline):
    positive, negative = prompts(loaded)
    wanted, sigmas = reference(pipeline)
    picture = sampled(loaded.model, loaded.vae, positive, negative, sigmas)
    assert wanted.std() > 0.02
    torch.testing.assert_close(picture.cpu(), wanted, atol=1e-4, rtol=0)
