"""A diffusers folder of SD2.1-base, or another of its shape: its frozen parts, which encode images and captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ezigen.subject_pairs import subject_prompt
from ...core.ezigen.train import TIMESTEPS, Sample
from ...core.fit.fit import step_generator
from .data import Item

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class Base:
    def __init__(self, folder: Path) -> None:
        """Read the folder; ValueError, which says what is expected, for an invalid folder or an unsupported model."""
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        def read(name: str, kind: Any) -> Any:
            try:
                return kind.from_pretrained(folder / name, local_files_only=True)
            except Exception as error:  # these libraries raise many types
                raise ValueError(
                    f"{folder / name} could not be read ({error}): give the diffusers folder of SD2.1-base, complete "
                    f"with {', '.join(PARTS)}."
                ) from error

        kinds = UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDPMScheduler
        self.unet, self.vae, self.text_encoder, self.tokenizer, self.scheduler = map(read, PARTS, kinds)
        unet, latent, text = self.unet.config, self.vae.config.latent_channels, self.text_encoder.config
        kind, steps = self.scheduler.config.prediction_type, self.scheduler.config.num_train_timesteps
        problem = ""
        if kind != "epsilon":
            problem = f"it predicts '{kind}' (SD2.1 at 768 predicts v), a model that predicts noise was expected"
        elif steps != TIMESTEPS:
            problem = f"it has {steps} timesteps, {TIMESTEPS} were expected"
        elif unet.cross_attention_dim != text.hidden_size or unet.addition_embed_type is not None:
            problem = (
                f"the UNet takes more than the {text.hidden_size} numbers a token of its one text encoder, as SDXL's"
            )
        elif unet.in_channels != latent:
            problem = f"the UNet takes {unet.in_channels} channels, the autoencoder gives {latent}, as for inpainting"
        if problem:
            raise ValueError(f"{folder}: {problem}: give SD2.1-base (512), or SD1.x.")

    def freeze(self, device: torch.device, dtype: torch.dtype) -> None:
        for part in (self.unet, self.vae, self.text_encoder):
            nn.Module.to(part, device, dtype)  # diffusers' own to() warns of float32 layers: there are none
            part.requires_grad_(False).train(False)
        self.vae.enable_slicing()  # its activations at 512 pixels are the largest of all

    @torch.no_grad()
    def samples(self, items: Sequence[Item], seed: int) -> list[Sample]:
        """The samples of one batch, in float32 on the networks' device.

        The random numbers depend only on (seed, number of the sample).
        """
        pairs, counts = [item.pair for item in items], [1 + len(item.pair.subjects) for item in items]
        images = torch.cat([torch.cat([pair.target[None], pair.subjects]) for pair in pairs])
        texts = [text for pair in pairs for text in (pair.caption, *map(subject_prompt, pair.classes))]
        generators = [step_generator(seed, item.number, "adapter latents") for item in items]
        each = [generator for generator, count in zip(generators, counts, strict=True) for _ in range(count)]
        latents, contexts = self._latents(images, each).split(counts), self._contexts(texts).split(counts)
        return [Sample(z[0], tokens[0], z[1:], tokens[1:]) for z, tokens in zip(latents, contexts, strict=True)]

    def _latents(self, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Draws from the autoencoder's posterior, as published; images [B, 3, S, S] are uint8."""
        from diffusers.utils.torch_utils import randn_tensor

        scaled = images.to(self.vae.device).to(self.vae.dtype) / 127.5 - 1
        posterior = self.vae.encode(scaled).latent_dist
        noise = randn_tensor(posterior.mean.shape, generator=generators, device=self.vae.device)
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    def _contexts(self, texts: list[str]) -> Tensor:
        """Token embeddings of prompts, [B, n, d]: the last hidden state after its norm, as published."""
        length = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0].float()
