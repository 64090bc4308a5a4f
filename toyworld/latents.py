"""Stage "latents": encode the training scenes once and find the shift and scale that make the latents mean 0, std 1."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from . import autoencoder, dataset
from .train_ae import file_name, picture_batch, psnr
from .training import WORK, log


def file_of(channels: int) -> Path:
    """Where the normalised latents of an autoencoder with so many channels lie."""
    return WORK / f"latents{'' if channels == autoencoder.CHANNELS else channels}.pt"


def load_autoencoder(channels: int = autoencoder.CHANNELS) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """The trained encoder and decoder of the work folder, frozen."""
    saved = torch.load(WORK / f"{file_name(channels)}.pt", weights_only=True)
    encoder, decoder = autoencoder.make_encoder(channels), autoencoder.make_decoder(channels)
    encoder.load_state_dict(saved["encoder"])
    decoder.load_state_dict(saved["decoder"])
    return encoder.train(False).requires_grad_(False), decoder.train(False).requires_grad_(False)


@torch.no_grad()
def encode_scenes(encoder: torch.nn.Module, images: object) -> torch.Tensor:
    """Raw latents [N,C,12,12] of uint8 pictures [N,96,96,3]."""
    return torch.cat(
        [encoder(picture_batch(images, torch.arange(a, min(a + 128, len(images))))) for a in range(0, len(images), 128)]
    )


def main(arguments: list[str]) -> None:
    """Write latents.pt (latents16.pt of sixteen channels): normalised fp16 latents with their shift and scale."""
    parser = argparse.ArgumentParser(prog="run.py latents")
    parser.add_argument("--channels", type=int, default=autoencoder.CHANNELS)
    channels = parser.parse_args(arguments).channels
    torch.set_num_threads(2)
    began = time.time()
    encoder, decoder = load_autoencoder(channels)
    latents = encode_scenes(encoder, dataset.load("train")["images"])
    log("per-channel mean", latents.mean((0, 2, 3)).tolist(), "std", latents.std((0, 2, 3)).tolist())
    shift, scale = latents.mean(), latents.std()
    held = picture_batch(dataset.load("held_out")["images"], torch.arange(256))
    with torch.no_grad():
        raw, generator = encoder(held), torch.Generator().manual_seed(0)
        for noise in (0.0, 0.05, 0.1, 0.2):
            noisy = raw + torch.randn(raw.shape, generator=generator) * scale * noise
            log(f"latent noise {noise}: {psnr(decoder(noisy).clamp(0, 1), held):.2f} dB")
    torch.save({"latents": ((latents - shift) / scale).half(), "shift": shift, "scale": scale}, file_of(channels))
    log(f"shift {shift:.4f} scale {scale:.4f}, {time.time() - began:.0f} s")
