"""What null-text optimisation, reference guidance and playing them again cost beside the bare model calls.

Bare: the same forward, backward and Adam step on the same UNet, without ComfyUI's executor and guider; for a sampling,
ComfyUI's own sampler with plain prompts. Both by turns in one process, the medians' ratio counts, not the seconds.
Playing a reference-guided picture again evaluates two negatives, one inside and one outside of the mask, in the guided
steps: it is compared with a stock sampling of two masked prompts there, and with a plain sampling.

    python toolbox/_load.py benchmarks.cost_inversion --out benchmarks/results/cost_inversion.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import hosting
from .cost import LATENT, by_turns

STEPS, CFG, MANY = 10, 7.5, 1 << 30
SAMPLINGS = 10  # rounds of a whole sampling
UPDATE_GATE, REPLAY_GATE = 1.15, 1.05


def latents(seed: int = 0, count: int = 1) -> Any:
    """Noise, as a trajectory of `count` entries."""
    import torch

    return torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(seed))


def corner() -> Any:
    """A mask of a quarter of the picture [1, 1, h, w]."""
    import torch

    mask = torch.zeros(1, 1, *LATENT[2:])
    mask[..., : LATENT[2] // 2, : LATENT[3] // 2] = 1
    return mask


def bare_update(model: Any, denoiser: Any, x: Any, sigmas: Any, context: Any, null: Any, loss_of: Callable) -> Callable:
    """An update of the embedding of one step, on the UNet alone."""
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    unet = model.model.diffusion_model
    options = {"optimized_attention_override": lambda _chosen, *a, **k: attention_pytorch(*a, **k)}
    u = null.clone().requires_grad_(True)
    adam = torch.optim.Adam([u], lr=1e-2)
    sigma, following = sigmas[0], sigmas[1]
    t = (denoiser.sigmas - sigma).abs().argmin().view(1).float()

    def eps(rows: Any) -> Any:
        return unet(x / (sigma**2 + 1) ** 0.5, t, context=rows, transformer_options=options)

    with torch.no_grad():
        eps_c = eps(context)

    def update() -> None:
        eps_u = eps(u)
        loss = loss_of(x + (following - sigma) * (eps_u + CFG * (eps_c - eps_u)), following)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return update


def updates(model: Any, prompt: list, negative: list, sigmas: Any) -> dict[str, dict[str, float]]:
    """One update of null-text optimisation and one of reference guidance, each in the gradient session."""
    import torch

    from ..core.inversion.null_text import NullText, NullTextSettings
    from ..core.reference.guidance import ReferenceGuide, ReferenceSettings
    from ..core.session.session import Session

    found: dict[str, dict[str, float]] = {}
    context, null = prompt[0][0].clone(), negative[0][0].clone()
    trajectory, mask = latents(count=STEPS + 1), corner()

    def body(denoiser: Any, x0: Any) -> None:
        way = denoiser.of("negative")
        fit = NullText(denoiser, trajectory, sigmas, context, null, NullTextSettings(CFG, MANY, epsilon=0.0), way)
        target = trajectory[1]
        bare = bare_update(
            model, denoiser, trajectory[0], sigmas, context, null,
            lambda x, following: ((x - target).square() / (1 + following**2)).mean(),
        )  # fmt: skip
        found["null-text update"] = by_turns(fit.update, bare)
        guide = ReferenceGuide(
            denoiser, trajectory[0], trajectory, sigmas, [context] * STEPS, null, mask, range(0, STEPS),
            ReferenceSettings(CFG, MANY), way,
        )  # fmt: skip
        bare = bare_update(
            model, denoiser, trajectory[0], sigmas, context, null,
            lambda x, following: ((x - target).square() * mask).sum() / (mask.sum() * 4 * (1 + following**2)),
        )  # fmt: skip
        found["reference guide update"] = by_turns(guide.update, bare)

    with torch.inference_mode():
        Session(model, prompt, latents()[0], negative=negative).run(body)
    return found


def replays(model: Any, prompt: list, negative: list, sigmas: Any) -> dict[str, dict[str, float]]:
    """Sampling with what the nodes give out, beside stock sampling."""
    import comfy.samplers
    import torch

    from ..core.inversion.host.landing import Landing, landed
    from ..core.prompt.windows import step_wise, windows
    from ..core.reference.guidance import END_PERCENT, START_PERCENT
    from ..core.reference.host.guidance import guided_steps, masked_negative

    sampling = model.get_model_object("model_sampling")
    levels, trajectory, mask = sigmas.tolist(), latents(count=STEPS + 1), corner()
    null = negative[0][0]
    nulls = step_wise(negative, [null] * STEPS, windows(levels, sampling.percent_to_sigma))
    direct = landed(model, Landing(dict(enumerate(trajectory[1:])), tuple(levels), rows=1))
    window = guided_steps(levels, START_PERCENT, END_PERCENT, sampling.percent_to_sigma)
    masked = masked_negative(negative, null.repeat(len(window), 1, 1), mask, window, levels, sampling)
    times = windows(levels, sampling.percent_to_sigma)
    begin, end = times[window[0]][0], times[window[-1]][1]
    first, last = ({"start_percent": 0.0, "end_percent": begin}, {"start_percent": end, "end_percent": 1.0})
    middle = [{"start_percent": begin, "end_percent": end, "mask": where[0]} for where in (mask, 1 - mask)]
    stock = [[null, {**negative[0][1], **times}] for times in (first, *middle, last)]
    guided = landed(model, Landing({window[0] - 1: trajectory[window[0]]}, tuple(levels), mask))

    def run(chosen: Any, conditioning: list) -> None:
        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(chosen)
            guider.set_conds(prompt, conditioning)
            guider.set_cfg(CFG)
            sampler, zeros = comfy.samplers.sampler_object("euler"), torch.zeros(LATENT)
            guider.sample(latents()[0], zeros, sampler, sigmas, disable_pbar=True, seed=0)

    def plain() -> None:
        run(model, negative)

    return {
        "null-text replay": by_turns(lambda: run(model, nulls), plain, SAMPLINGS),
        "direct replay": by_turns(lambda: run(direct, negative), plain, SAMPLINGS),
        "reference guide replay": by_turns(lambda: run(guided, masked), lambda: run(model, stock), SAMPLINGS),
        "reference guide replay beside plain sampling": by_turns(lambda: run(guided, masked), plain, SAMPLINGS),
    }


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost_inversion")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    model, clip, _ = hosting.small_world(hosting.start(options.threads))
    import comfy.samplers
    import torch

    with torch.inference_mode():
        prompt, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a photo of a dog in the snow", "")
        )
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", STEPS)
    figures = {**updates(model, prompt, negative, sigmas), **replays(model, prompt, negative, sigmas)}
    missed = []
    for name, values in figures.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
        gate = UPDATE_GATE if name.endswith("update") else REPLAY_GATE
        missed += [name] if values["ratio"] > gate and not name.endswith("plain sampling") else []
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {**figures, "steps": STEPS, "torch": torch.__version__, "threads": options.threads}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"missed gates: {', '.join(missed) or 'none'}\n")
    return int(bool(missed))
