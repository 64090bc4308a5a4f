"""Stage "ae": train the autoencoder on random crops, by mean squared error with small edge and absolute terms."""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from . import autoencoder, dataset, painting, training, world
from .training import RANK, RANKS, WORK, log

# Noise added to the latents in training, so that the decoder forgives small errors of a sampler. Sixteen channels have
# room to spare: more noise makes them share what they know, which a generator learns faster.
LATENT_NOISE = {autoencoder.CHANNELS: 0.04, autoencoder.FLOW_CHANNELS: 0.15}


def file_name(channels: int) -> str:
    """The autoencoder with this many latent channels in the work folder, without the ending."""
    return "ae" if channels == autoencoder.CHANNELS else f"ae{channels}"


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels of pictures in 0..1."""
    return -10 * math.log10(F.mse_loss(a, b).item())


def picture_batch(images: object, chosen: torch.Tensor) -> torch.Tensor:
    """Rows of a uint8 array [N,H,W,3] as float [B,3,H,W] in 0..1."""
    return torch.from_numpy(images[chosen.numpy()]).permute(0, 3, 1, 2).float().div_(255)


def loss(encoder: nn.Module, decoder: nn.Module, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Reconstruction loss plus a weak pull of the latents to mean 0 and variance 1."""
    latents = encoder(pictures)
    noise = torch.randn(latents.shape, generator=generator) * LATENT_NOISE[latents.shape[1]]
    difference = decoder(latents + noise) - pictures
    edges = (difference[..., 1:] - difference[..., :-1]).abs().mean() + (
        difference[..., 1:, :] - difference[..., :-1, :]
    ).abs().mean()
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    return (
        difference.square().mean()
        + 0.02 * difference.abs().mean()
        + 0.02 * edges
        + 0.001 * (mean.square().mean() + (variance - 1).square().mean())
    )


@torch.no_grad()
def reconstruct(encoder: nn.Module, decoder: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Encode and decode in small batches, clamped to 0..1."""
    return torch.cat([decoder(encoder(part)).clamp(0, 1) for part in pictures.split(64)])


def main(arguments: list[str]) -> None:
    """Train, then write ae.pt (ae16.pt of sixteen channels) and a picture of held-out reconstructions."""
    parser = argparse.ArgumentParser(prog="run.py ae")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16, help="crops per process")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--channels", type=int, default=autoencoder.CHANNELS, choices=tuple(LATENT_NOISE))
    options = parser.parse_args(arguments)
    name = file_name(options.channels)
    training.start()
    images = dataset.load("train")["images"]
    held = picture_batch(dataset.load("held_out")["images"], torch.arange(256))
    encoder, decoder = autoencoder.make_encoder(options.channels), autoencoder.make_decoder(options.channels)
    autoencoder.initialise(encoder, decoder, seed=2)
    every = [*encoder.parameters(), *decoder.parameters()]
    ends = {id(encoder[0].weight), id(encoder[-1].weight), id(decoder[1].weight), id(decoder[-1].weight)}
    matrices = [p for p in every if p.ndim == 4 and id(p) not in ends]
    chosen = {id(p) for p in matrices}
    optimiser = training.Muon(matrices, [p for p in every if id(p) not in chosen], rate=0.01, adam_rate=1.5e-3)
    keeper = training.Keeper(name, {"encoder": encoder, "decoder": decoder, "optimiser": optimiser})
    first, began = keeper.resume(), time.time()
    margin = world.SIZE - options.crop + 1
    for step in range(first, options.steps):
        generator = training.step_generator(100, step)
        rows = torch.randint(len(images), (options.batch,), generator=generator)
        top, left = torch.randint(margin, (2,), generator=generator).tolist()
        pictures = picture_batch(images, rows)[..., top : top + options.crop, left : left + options.crop]
        value = loss(encoder, decoder, pictures, generator)
        value.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=30, decay_from=0.15))
        if (step + 1) % 100 == 0:
            shown = f"{psnr(reconstruct(encoder, decoder, held[:64]), held[:64]):.2f} dB" if RANK == 0 else ""
            log(
                step + 1, f"loss {value.item():.5f}", shown, f"{(step + 1 - first) / (time.time() - began):.2f} steps/s"
            )
        keeper.save(step + 1)
    if RANK == 0:
        keeper.save(options.steps, now=True)
        again = reconstruct(encoder, decoder, held)
        log("held-out", f"{psnr(again, held):.2f} dB after", options.steps, "steps of", options.batch * RANKS, "crops")
        torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, WORK / f"{name}.pt")
        pairs = torch.cat([held[:32].view(4, 8, *held.shape[1:]), again[:32].view(4, 8, *held.shape[1:])], 1)
        shown = (pairs.flatten(0, 1).permute(0, 2, 3, 1) * 255 + 0.5).byte().numpy()
        painting.contact_sheet(list(shown), 8).save(WORK / f"{name}.png")
