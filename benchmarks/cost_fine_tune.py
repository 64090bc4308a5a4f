"""What a fine-tuning step costs beside the bare model calls, as a LoRA and with all weights, on the small world.

Bare: the same forward, backward and AdamW step on the same modules and the same trained numbers, with eq. 1 written
out, without the gradient session, the guider and the position map's look-up of windows. Timed by turns in one process;
bytes that autograd holds for backward are counted as in benchmarks.cost.

    python toolbox/_load.py benchmarks.cost_fine_tune --out benchmarks/results/cost_fine_tune.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import hosting
from .cost import LATENT, by_turns, held_for_backward

RANK, CELLS = 16, 24
GATE = 1.15


def measured(model, prompt, full: bool) -> dict[str, dict[str, float]]:
    """Seconds of one update and bytes held, ours and bare."""
    import contextlib

    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    from ..core.denoiser import Prompt
    from ..core.lora.low_rank import attention_layers, beside, factors, new_adapters
    from ..core.session.session import Session
    from ..core.sine.fine_tune import FineTune, FineTuneSettings, Samples
    from ..core.sine.host.position_map import with_position_map
    from ..core.sine.position_map import position_map

    found: dict[str, dict[str, float]] = {}
    latent = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[3, 5, 15, 21]])

    def body(denoiser, x0):
        unet = model.model.diffusion_model
        layers = {} if full else attention_layers(unet, "diffusion_model")
        adapters = new_adapters(layers, RANK, 0)
        leaves = denoiser.leaves if full else factors(adapters)
        context = prompt[0][0].clone()
        fit = FineTune(denoiser, Samples(x0, box), lambda: Prompt(context), leaves, FineTuneSettings(1e-9))
        adam = torch.optim.AdamW(list(leaves.values()), lr=1e-9)
        generator = torch.Generator().manual_seed(0)
        added = position_map(320, CELLS, box, (LATENT[2], LATENT[3]))

        def place(h, options):
            return h + added if options["block"] == ("input", 0) else h

        def bare_loss():
            t = torch.randint(0, 1000, (1,), generator=generator)
            noise = torch.randn(LATENT, generator=generator)
            sigma = denoiser.sigmas[t]
            options = {
                "optimized_attention_override": lambda _chosen, *a, **k: attention_pytorch(*a, **k),
                "patches": {"input_block_patch": [place]},
            }
            x = (x0 + sigma * noise) / (sigma**2 + 1) ** 0.5
            error = unet(x, t.float(), context=context, transformer_options=options) - noise
            return error.square().mean() + (t / 1000) ** 2 * (sigma * error).abs().mean()

        def bare():
            adam.zero_grad(set_to_none=True)
            bare_loss().backward()
            adam.step()

        def our_loss():
            t, noise = fit.draw(fit.samples, generator)
            return fit.loss(fit.prompt(), x0, t, noise, box, None, 1.0)[0]

        with beside(layers, adapters) if layers else contextlib.nullcontext():
            found["step"] = by_turns(lambda: fit.update(), bare)
            ours, plain = held_for_backward(our_loss), held_for_backward(bare_loss)
            found["bytes held for backward"] = {"ours": ours, "bare": plain, "ratio": ours / plain}

    with torch.inference_mode():
        Session(with_position_map(model, CELLS, "bilinear"), prompt, latent, all_weights=full).run(body)
    return found


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost_fine_tune")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    model, clip, _ = hosting.small_world(hosting.start(options.threads))
    import torch

    with torch.inference_mode():
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("photo of a sks dog"))
    found = {
        f"{name}, {key}": values
        for name, full in (("LoRA", False), ("full weights", True))
        for key, values in measured(model, prompt, full).items()
    }
    for name, values in found.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
    if options.out:
        content = {**found, "torch": torch.__version__, "threads": options.threads}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    missed = [name for name, values in found.items() if values["ratio"] > GATE]
    sys.stdout.write(f"missed gates: {', '.join(missed) or 'none'}\n")
    return int(bool(missed))
