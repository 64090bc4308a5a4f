"""What a fine-tuning step costs beside the bare model calls, as a LoRA and with all weights, on toyworld.

Bare: the same forward, backward and AdamW step on the same modules and the same trained numbers, with eq. 1 written
out, without the gradient session, the guider and the position map's look-up of windows. Bytes that autograd holds for
backward are counted as in benchmarks.cost.

    python toolbox/_load.py benchmarks.cost_fine_tune --out benchmarks/results/cost_fine_tune.json
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.denoiser import Prompt
from ..core.lora.low_rank import attached_lora, block_layers, factors, new_adapters
from ..core.sine.fine_tune import FineTune, FineTuneSettings, Samples
from ..core.sine.position_map import position_map
from . import frame, hosting
from .frame import by_turns, held_for_backward
from .hosting import LATENT

CELLS, GATE = 24, 1.15


@dataclass(frozen=True)
class Settings:
    """How often a step is timed, and the LoRA. The learning rate changes next to nothing from round to round."""

    rounds: int = 20
    rank: int = 16
    learning_rate: float = 1e-9


def measured(model: Any, prompt: list, full: bool, how: Settings) -> dict[str, dict[str, float]]:
    """Seconds of one update and bytes held, ours and bare."""
    from ..core.session.session import Session
    from ..core.sine.host.position_map import with_position_map

    found: dict[str, dict[str, float]] = {}
    box = torch.tensor([[3, 5, 15, 21]])
    added = position_map(320, CELLS, box, (LATENT[2], LATENT[3]))
    place = {"input_block_patch": [lambda h, options: h + added if options["block"] == ("input", 0) else h]}
    options = {**hosting.plain_attention(), "patches": place}

    def body(denoiser: Any, x0: Any) -> None:
        unet = model.model.diffusion_model
        layers = {} if full else block_layers(unet, "diffusion_model")
        adapters = new_adapters(layers, how.rank, 0)
        leaves = denoiser.leaves if full else factors(adapters)
        context = prompt[0][0].clone()
        settings = FineTuneSettings(how.learning_rate)
        fit = FineTune(denoiser, Samples(x0, box), lambda: Prompt(context), leaves, settings)
        adam = torch.optim.AdamW(list(leaves.values()), lr=how.learning_rate)
        generator = torch.Generator().manual_seed(0)

        def bare_loss() -> Any:
            t = torch.randint(0, 1000, (1,), generator=generator)
            noise = torch.randn(LATENT, generator=generator)
            sigma = denoiser.sigmas[t]
            x = (x0 + sigma * noise) / (sigma**2 + 1) ** 0.5
            error = unet(x, t.float(), context=context, transformer_options=options) - noise
            return error.square().mean() + (t / 1000) ** 2 * (sigma * error).abs().mean()

        def our_loss() -> Any:
            t, noise = fit.draw(fit.samples, generator)
            return fit.loss(fit.prompt(), x0, t, noise, box, None, 1.0)[0]

        with attached_lora(layers, adapters) if layers else contextlib.nullcontext():
            found["step"] = by_turns(fit.update, frame.update(bare_loss, adam), how.rounds)
            ours, plain = held_for_backward(our_loss), held_for_backward(bare_loss)
            found["bytes held for backward"] = {"ours": ours, "bare": plain, "ratio": ours / plain}

    with torch.inference_mode():
        mapped = with_position_map(model, CELLS, "bilinear")
        Session(mapped, prompt, hosting.latents()[0], all_weights=full).run(body)
    return found


def figures(base: Path, how: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """Both ways of tuning."""
    model, clip, _ = hosting.small_world(base)
    (prompt,) = hosting.encoded(clip, "photo of a sks dog")
    for name, full in (("LoRA", False), ("full weights", True)):
        for key, values in measured(model, prompt, full, how).items():
            yield f"{name}, {key}", values


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("cost_fine_tune", arguments, Settings())
    found = run.table(figures(run.base, run.settings))
    return run.costs(found, {name: values["ratio"] <= GATE for name, values in found.items()})
