"""Are the gradients right on your machine, with your checkpoint?

    python toolbox/_load.py benchmarks.gradients --checkpoint FILE

Compares every gradient that the pack relies on with finite differences. COMFYUI_PATH names the ComfyUI folder. Without
a checkpoint the small world's is built and used; --vision adds a folder of models/likeness_vision.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

LIMIT = 0.01


def main(arguments: list[str]) -> int:
    """Print one line for each thing that is differentiated; exit 1 when a gradient is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.gradients")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint file (default: the small world)")
    parser.add_argument("--vision", type=Path, help="a transformers folder of a vision model")
    parser.add_argument("--size", type=int, default=96, help="side of the image in pixels")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)

    from . import hosting

    base = hosting.start(options.threads)
    import comfy.sd
    import torch

    from ..core.vision.host import vision
    from ..tests import gradients

    with torch.inference_mode():
        if options.checkpoint:
            model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(options.checkpoint))[:3]
        else:
            model, clip, vae = hosting.small_world(base)
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of a cat"))
        side = options.size // 8
        latent = torch.randn(1, vae.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
        found = [
            check(model, prompt, latent, checkpointing=checkpointing)
            for check in (
                gradients.check_conditioning,
                gradients.check_latent,
                gradients.check_lora,
                functools.partial(gradients.check_lora, clip=clip),
                functools.partial(gradients.check_weights, clip=clip),
            )
            for checkpointing in (False, True)
        ]
        found += [gradients.check_vae_decode(vae, latent), gradients.check_clip_text(clip)]
        if options.vision:
            found.append(gradients.check_vision(vision.load_vision(options.vision), torch.rand(1, 96, 96, 3)))
    for check in found:
        verdict = "right" if check.relative_error < LIMIT else "WRONG"
        values = f"backward {check.analytic:.5g}, differences {check.numeric:.5g}, error {check.relative_error:.2%}"
        sys.stdout.write(f"{check.name}: {values}: {verdict}\n")
    return int(any(check.relative_error >= LIMIT for check in found))
