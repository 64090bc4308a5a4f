"""What a MODEL's sampling says of itself, and images of latents."""

import math
from typing import Any

import torch
from torch import Tensor

from ..fit.presets import FLOW, NOISE


def output_scale(sampling: Any, sigma: Tensor) -> Tensor:
    """s(sigma) [B] of denoiser.py: ComfyUI computes D linearly from the network's output, whatever that predicts."""
    none = sigma.new_zeros(len(sigma), 1, 1, 1)
    scale = sampling.calculate_denoised(sigma, none, none) - sampling.calculate_denoised(sigma, none + 1, none)
    return scale.flatten()


def objective(sampling: Any) -> dict[str, str]:
    """The entry of a header for a loss on the network's output; empty where its errors count as those of noise do (eps
    and flow models, and LCM's but for the cleanest level), whose runs and headers are older than the entry.
    """
    sigmas = sampling.sigmas[1:].detach().float()
    as_noise = torch.allclose(output_scale(sampling, sigmas).abs(), sigmas, rtol=1e-2, atol=0.0)
    return {} if as_noise else {"objective": "network output"}


def adds_noise(sampling: Any) -> bool:
    """Whether a latent keeps its size under noise."""
    ones = torch.ones(1, 1, 1, 1)
    return float(sampling.noise_scaling(torch.full((1,), 0.5), 0 * ones, ones)) == 1.0


def kind_of(model: Any) -> str:
    """The kind of a MODEL, for presets."""
    return NOISE if adds_noise(model.get_model_object("model_sampling")) else FLOW


def noisy_start(sampling: Any, noise: Tensor, latent: Tensor, sigmas: Tensor) -> Tensor:
    """The input to ComfyUI's samplers: a latent in the model's own space, noised to the first of the levels."""
    first, highest = float(sigmas[0]), float(sampling.sigma_max)
    full_noise = first > highest or math.isclose(first, highest, rel_tol=1e-5)
    return sampling.noise_scaling(sigmas[0].to(noise), noise.clone(), latent, full_noise)


def with_options(extra_args: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of a running sampler, with further transformer options."""
    model_options = extra_args["model_options"]
    options = {**model_options.get("transformer_options", {}), **options}
    return {**extra_args, "model_options": {**model_options, "transformer_options": options}}


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, H, W, 3] in 0..1, each decoded by itself: a batch's bytes would depend on the other images."""
    return torch.cat([vae.decode(latent[None]).flatten(0, -4) for latent in latents])  # a video VAE's have frames
