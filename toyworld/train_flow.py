"""Stage "flow": train the flow transformer to predict noise minus latent, on the first world's frozen text encoder.

Products of matrices are computed in bf16, which is 1.7 times as fast on a CPU that knows it. For most of the run the
network reads only the first 28 of a prompt's 77 tokens, as many as the longest caption has: the rest is padding.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from . import autoencoder, comfyui, dataset, training
from .flow_network import condition, make_mmdit, noise_share, split_parameters
from .latents import file_of
from .networks import token_ids
from .train_unet import draw_batch
from .training import WORK, log

SEED = 3000
SHORT, SHORT_UNTIL = 28, 0.6
# Times are drawn from a logit-normal distribution before the shift: most where a picture's content is decided.
CENTRE, SPREAD = -0.3, 1.2


def draw_times(strata: torch.Tensor) -> torch.Tensor:
    """Share of noise [B] from numbers spread evenly from 0 to 1 (both excluded)."""
    return noise_share((CENTRE + SPREAD * torch.special.ndtri(strata)).sigmoid())


def standard_of(text: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [96] of the text encoder's last layer over prompts."""
    hidden = text.hidden(rows.long()).flatten(0, 1)
    return hidden.mean(0), hidden.std(0)


def main(arguments: list[str]) -> None:
    """Train; flow.pt (averaged weights) is rewritten once a minute."""
    from .narrow import load_text

    parser = argparse.ArgumentParser(prog="run.py flow")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=32, help="samples per process")
    parser.add_argument("--decay-from", type=float, default=0.5, help="share of the steps at full rate")
    parser.add_argument("--until", type=int, default=None, help="stop after so many steps, to go on another time")
    options = parser.parse_args(arguments)
    last = training.stopping_point(options)
    training.start()
    comfyui.prepare()
    stored = torch.load(file_of(autoencoder.FLOW_CHANNELS), weights_only=True)
    latents = stored["latents"].float()
    text, tokenizer = load_text()
    rows = text.rows_of(token_ids(tokenizer, [*dataset.load("train")["captions"], ""]))
    with torch.no_grad():
        standard = standard_of(text, rows[:1024])
    torch.manual_seed(4)
    network = make_mmdit()
    optimiser = training.Muon(*split_parameters(network), rate=0.01, adam_rate=1e-3, precision=torch.bfloat16)
    average = training.Average(optimiser.parameters, decay=0.999)
    keeper = training.Keeper("flow", {"network": network, "optimiser": optimiser, "average": average})
    first, began, total = keeper.resume(), time.time(), 0.0
    log(sum(parameter.numel() for parameter in network.parameters()), "parameters")
    unknown = len(text.vocabulary)
    for step in range(first, last):
        clean, texts, times, noise = draw_batch(
            latents, rows, options.batch, unknown, training.step_generator(SEED, step)
        )
        share = draw_times((times + 0.5) / 1000)
        with torch.no_grad():
            tokens, pooled = condition(text, texts, *standard)
        if step < SHORT_UNTIL * options.steps:
            tokens = tokens[:, :SHORT]
        mix = share.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            found = network((1 - mix) * clean + mix * noise, 1000 * share, y=pooled, context=tokens)
        loss = (found.float() - (noise - clean)).square().mean()
        loss.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=100, decay_from=options.decay_from))
        average.update(step)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            log(step + 1, f"error {total / 100:.4f}", f"{(step + 1 - first) / (time.time() - began):.2f} steps/s")
            total = 0.0
        if keeper.save(step + 1, now=step + 1 == last):
            average.swap()
            trained = {"network": network.state_dict(), "mean": standard[0], "std": standard[1], "steps": step + 1}
            torch.save({**trained, "shift": stored["shift"], "scale": stored["scale"]}, WORK / "flow.pt")
            average.swap()
