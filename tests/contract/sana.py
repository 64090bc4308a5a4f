"""What the tests of Sana share: prompts, noise, and images of stock samplers and of diffusers' own pipeline."""

from __future__ import annotations

import torch

from .. import tiny_sana

PROMPT, NEGATIVE = "A photo of a Dog ", ""
STEPS, CFG, SEED = 4, 4.5, 3
SHAPE = (1, tiny_sana.CHANNELS, 2, 4)  # of an image of 128 x 64


def encoded(clip, text: str) -> list:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def noise() -> torch.Tensor:
    """What ComfyUI draws for the seed."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))


def reference(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Image [1, H, W, 3] of diffusers' pipeline, and the noise levels that it took."""
    picture = pipeline(
        PROMPT,
        NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        height=SHAPE[2] * 32,
        width=SHAPE[3] * 32,
        latents=noise(),
        output_type="pt",
        use_resolution_binning=False,
    ).images
    return picture.movedim(1, -1), pipeline.scheduler.sigmas.clone()


def empty() -> torch.Tensor:
    """As the stock node for samples that are 32 times smaller than the image makes it."""
    from comfy_extras.nodes_hunyuan import EmptyHunyuanImageLatent

    return EmptyHunyuanImageLatent.execute(SHAPE[3] * 32, SHAPE[2] * 32, 1).result[0]["samples"]


def levels(model, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def pictured(model, vae, prompts, sigmas) -> torch.Tensor:
    """What stock sampling and decoding make."""
    import comfy.sample
    import comfy.samplers

    with torch.inference_mode():
        latent = comfy.sample.fix_empty_latent_channels(model, empty())
        given = comfy.sample.prepare_noise(latent, SEED)
        sampler = comfy.samplers.sampler_object("euler")
        samples = comfy.sample.sample_custom(
            model, given, CFG, sampler, sigmas, *prompts, latent, disable_pbar=True, seed=SEED
        )
        return vae.decode(samples).cpu()
