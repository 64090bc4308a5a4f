"""What comes in: images, masks and VAEs, checked once, with one wording for every node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import latent_mask


@dataclass(frozen=True)
class TrainingImages:
    """What is learned from: latent [B, C, h, w] as in a LATENT; mask [B or 1, 1, h, w] of ones and zeros, or None."""

    latent: Tensor
    mask: Tensor | None


def training_images(
    model: Any, latent: dict[str, Tensor] | None, image: Tensor | None, vae: Any | None, mask: Tensor | None
) -> TrainingImages:
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
        return TrainingImages(samples, None)
    if mask.ndim == 2:
        mask = mask[None]
    if mask.shape[0] not in (1, samples.shape[0]):
        raise ValueError(
            f"{mask.shape[0]} masks came with {samples.shape[0]} pictures: give one mask, or one for each picture."
        )
    return TrainingImages(samples, latent_mask(mask.float().cpu(), *samples.shape[-2:]))


def check_vae(model: Any, vae: Any) -> None:
    """ValueError when the VAE is another model's."""
    channels = model.get_model_object("latent_format").latent_channels
    given = getattr(vae, "latent_channels", channels)
    if given != channels:
        raise ValueError(f"The VAE's latents have {given} channels, the model's {channels}: use the model's own VAE.")
