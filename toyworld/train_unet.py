"""Stage "unet": train the narrow UNet and its text encoder together, to predict the noise of caption-guided latents."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from . import comfyui, dataset, training
from .networks import TextEncoder, alphas_cumprod, make_unet, token_ids, zero_ends
from .training import RANK, RANKS, WORK, log

CAPTION_DROP, UNKNOWN_TOKENS = 0.10, 0.004
# First and last layers and the token tables are trained by Adam, all other matrices by Muon.
ADAM_NAMES = ("unet.input_blocks.0.0", "unet.out.2", "text.token_embedding", "text.position_embedding")


def noise_weight(alphas: torch.Tensor) -> torch.Tensor:
    """Loss weight per timestep: sqrt(min(SNR, 5)) / SNR, at most 6 (between plain noise loss and min-SNR weighting)."""
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=5).sqrt() / snr).clamp(max=6)


def tokenised(captions: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Table rows of all captions and of the empty one (last), uint8, and the vocabulary of CLIP ids they use."""
    from transformers import CLIPTokenizer

    ids = token_ids(CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path())), [*captions, ""])
    vocabulary, rows = ids.unique(return_inverse=True)
    return rows.to(torch.uint8), vocabulary.tolist()


def draw_batch(
    latents: torch.Tensor, rows: torch.Tensor, batch: int, unknown: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean latents, table rows, timesteps (stratified over the processes' whole batch) and noise of one step."""
    chosen = torch.randint(len(latents), (batch,), generator=generator)
    strata = torch.arange(batch) * RANKS + RANK + torch.rand(batch, generator=generator)
    times = (strata / (batch * RANKS) * 1000).long().clamp(max=999)
    texts = rows[chosen].long()
    texts[torch.rand(batch, generator=generator) < CAPTION_DROP] = rows[-1].long()
    texts[torch.rand(texts.shape, generator=generator) < UNKNOWN_TOKENS] = unknown
    clean = latents[chosen]
    return clean, texts, times, torch.randn(clean.shape, generator=generator)


def split_parameters(parts: dict[str, nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for Adam) of the modules "unet." and "text."."""
    matrices, rest = [], []
    for prefix, module in parts.items():
        for name, parameter in module.named_parameters():
            by_muon = parameter.ndim >= 2 and not (prefix + name).startswith(ADAM_NAMES)
            (matrices if by_muon else rest).append(parameter)
    return matrices, rest


def main(arguments: list[str]) -> None:
    """Train; unet.pt (averaged weights) is rewritten once a minute."""
    parser = argparse.ArgumentParser(prog="run.py unet")
    parser.add_argument("--steps", type=int, default=7_000)
    parser.add_argument("--batch", type=int, default=16, help="samples per process")
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the steps at full rate")
    options = parser.parse_args(arguments)
    training.start()
    comfyui.prepare()
    stored = torch.load(WORK / "latents.pt", weights_only=True)
    latents = stored["latents"].float()
    rows, vocabulary = tokenised(dataset.load("train")["captions"])
    torch.manual_seed(1)
    unet, text = make_unet(), TextEncoder(vocabulary)
    zero_ends(unet)
    optimiser = training.Muon(*split_parameters({"unet.": unet, "text.": text}), rate=0.01, adam_rate=2e-3)
    average = training.Average(optimiser.parameters, decay=0.998)
    keeper = training.Keeper("unet", {"unet": unet, "text": text, "optimiser": optimiser, "average": average})
    first, began, sums = keeper.resume(), time.time(), torch.zeros(2)
    log(
        sum(p.numel() for p in unet.parameters()),
        "UNet,",
        sum(p.numel() for p in text.parameters()),
        "text parameters,",
        len(vocabulary),
        "tokens",
    )
    alphas = alphas_cumprod()
    weights = noise_weight(alphas)
    for step in range(first, options.steps):
        clean, texts, times, noise = draw_batch(
            latents, rows, options.batch, len(vocabulary), training.step_generator(1000, step)
        )
        alpha = alphas[times].view(-1, 1, 1, 1)
        predicted = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, times.float(), context=text(texts))
        error = (predicted - noise).square().mean((1, 2, 3))
        loss = (error * weights[times]).mean()
        loss.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=60, decay_from=options.decay_from))
        average.update(step)
        sums += torch.stack([error.mean(), loss]).detach()
        if (step + 1) % 100 == 0:
            log(
                step + 1,
                "noise error {:.4f} weighted {:.4f}".format(*(sums / 100).tolist()),
                f"{(step + 1 - first) / (time.time() - began):.2f} steps/s",
            )
            sums.zero_()
        if keeper.save(step + 1, now=step + 1 == options.steps):
            average.swap()
            torch.save(
                {
                    "unet": unet.state_dict(),
                    "text": text.state_dict(),
                    "vocabulary": vocabulary,
                    "steps": step + 1,
                    "shift": stored["shift"],
                    "scale": stored["scale"],
                },
                WORK / "unet.pt",
            )
            average.swap()
