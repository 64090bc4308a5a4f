"""A diffusers folder of SD2.1-base (or another Stable Diffusion of that shape): its frozen parts, and the encoding of
images and captions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ezigen.subject_pairs import subject_prompt
from ...core.ezigen.train import TIMESTEPS, Sample
from ...core.fit.fit import step_generator
from .data import Item

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
AT_ONCE = 4  # images per autoencoder batch: its activations at 512 pixels are the largest of all


@dataclass(frozen=True)
class Base:
    """The frozen parts on their device; alphas_cumprod [1000] on the CPU."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    alphas_cumprod: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the networks and freeze them."""
        for part in (self.unet, self.vae, self.text_encoder):
            nn.Module.to(
                part, device=device, dtype=dtype
            )  # diffusers' own to() warns of float32 layers: there are none
            part.requires_grad_(False).eval()

    def cell(self) -> int:
        """The image sides must be multiples of this many pixels."""
        vae, unet = (len(part.config.block_out_channels) - 1 for part in (self.vae, self.unet))
        return 2 ** (vae + unet)


def read_base(folder: Path) -> Base:
    """Read the folder; ValueError, which says what is expected, for an invalid folder or an unsupported model."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise ValueError(
            f"{folder} has no {', '.join(missing)}: give the diffusers folder of SD2.1-base (with {', '.join(PARTS)})."
        )
    scheduler = _read(folder, "scheduler", DDPMScheduler.from_pretrained)
    _check_scheduler(folder, scheduler)
    base = Base(
        _read(folder, "unet", UNet2DConditionModel.from_pretrained),
        _read(folder, "vae", AutoencoderKL.from_pretrained),
        _read(folder, "text_encoder", CLIPTextModel.from_pretrained),
        _read(folder, "tokenizer", CLIPTokenizer.from_pretrained),
        scheduler.alphas_cumprod,
    )
    unet, width = base.unet.config, base.text_encoder.config.hidden_size
    if unet.cross_attention_dim != width or unet.addition_embed_type is not None:
        raise ValueError(
            f"{folder}: the UNet takes prompts {unet.cross_attention_dim} wide, the text encoder gives {width}: only "
            "models with one text encoder (SD2.1-base, SD1.x) can be trained here."
        )
    if unet.in_channels != base.vae.config.latent_channels:
        raise ValueError(
            f"{folder}: the UNet takes {unet.in_channels} channels, the autoencoder gives "
            f"{base.vae.config.latent_channels}: give the base model, not one for inpainting or depth."
        )
    return base


def _read(folder: Path, name: str, read: Callable[..., Any]) -> Any:
    try:
        return read(folder / name, local_files_only=True)
    except Exception as error:  # these libraries raise many types
        raise ValueError(f"{folder / name} could not be read: {error}. Download it again.") from error


def _check_scheduler(folder: Path, scheduler: Any) -> None:
    kind, steps = scheduler.config.prediction_type, scheduler.config.num_train_timesteps
    if kind != "epsilon":
        raise ValueError(
            f"{folder} predicts '{kind}' (SD2.1 at 768 predicts v); the adapter is trained for models that predict "
            "noise: give SD2.1-base (512)."
        )
    if steps != TIMESTEPS:
        raise ValueError(f"{folder} has {steps} timesteps, {TIMESTEPS} were expected: give SD2.1-base.")


class Encoder:
    """Encodes pairs to samples; the random numbers depend only on (seed, number of the sample)."""

    def __init__(self, base: Base, seed: int) -> None:
        self.base, self.seed = base, seed
        limit = base.text_encoder.config.max_position_embeddings
        self.length = min(base.tokenizer.model_max_length, limit)

    @torch.no_grad()
    def samples(self, items: Sequence[Item]) -> list[Sample]:
        """The samples of one batch, in float32 on the networks' device."""
        images = torch.cat([torch.cat([item.target[None], item.subjects]) for item in items])
        counts = [1 + len(item.subjects) for item in items]
        noise = torch.cat([self._noise(item, images.shape[-1]) for item in items])
        latents = self._latents(images, noise).split(counts)
        texts = [text for item in items for text in (item.caption, *map(subject_prompt, item.classes))]
        contexts = self._contexts(texts).split(counts)
        return [Sample(z[0], rows[0], z[1:], rows[1:]) for z, rows in zip(latents, contexts, strict=True)]

    def _noise(self, item: Item, size: int) -> Tensor:
        config = self.base.vae.config
        side = size // 2 ** (len(config.block_out_channels) - 1)
        generator = step_generator(self.seed, item.number, "adapter latents")
        return torch.randn((1 + len(item.subjects), config.latent_channels, side, side), generator=generator)

    def _latents(self, images: Tensor, noise: Tensor) -> Tensor:
        """Draws from the autoencoder's posterior, as published; images [B, 3, S, S] are uint8."""
        vae, latents = self.base.vae, []
        for part, noise_part in zip(images.split(AT_ONCE), noise.split(AT_ONCE), strict=True):
            scaled = part.to(vae.device).to(vae.dtype) / 127.5 - 1
            posterior = vae.encode(scaled).latent_dist
            z = posterior.mean.float()
            latents.append(z + posterior.std.float() * noise_part.to(z))
        return torch.cat(latents) * vae.config.scaling_factor

    def _contexts(self, texts: list[str]) -> Tensor:
        """Token embeddings of prompts, [B, n, d]: the last hidden state after its norm, as published."""
        text_encoder = self.base.text_encoder
        tokens = self.base.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return text_encoder(tokens.input_ids.to(text_encoder.device))[0].float()
