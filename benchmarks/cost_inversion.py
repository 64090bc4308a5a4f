"""What null-text optimisation, reference guidance and playing them again cost beside the bare model calls.

Bare: the same forward, backward and Adam step on the same UNet, without ComfyUI's executor and guider; for a sampling,
ComfyUI's own sampler with plain prompts. Playing a reference-guided image again evaluates two negatives, one inside and
one outside of the mask, in the guided steps: it is compared with a stock sampling of two masked prompts there, and with
a plain sampling.

    python toolbox/_load.py benchmarks.cost_inversion --out benchmarks/results/cost_inversion.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.inversion.null_text import NullText, NullTextSettings
from ..core.prompt.windows import step_wise, windows
from ..core.reference.guidance import END_PERCENT, START_PERCENT, Reference, ReferenceGuide, ReferenceSettings
from . import frame, hosting
from .frame import by_turns
from .hosting import LATENT, latents

CFG, MANY = 7.5, 1 << 30
UPDATE_GATE, REPLAY_GATE = 1.15, 1.05


@dataclass(frozen=True)
class Settings:
    """Steps of the sampling; how often an update and a whole sampling are timed."""

    steps: int = 10
    rounds: int = 20
    samplings: int = 10


class Bench:
    """Toyworld with a prompt, a made-up trajectory, and a mask of a quarter of the image [1, 1, h, w]."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.model, clip, _ = hosting.small_world(base)
        self.settings, self.sigmas = settings, hosting.levels(self.model, settings.steps)
        self.prompt, self.negative = hosting.encoded(clip, "a photo of a dog in the snow", "")
        self.trajectory = latents(settings.steps + 1)
        self.mask = torch.zeros(1, 1, *LATENT[2:])
        self.mask[..., : LATENT[2] // 2, : LATENT[3] // 2] = 1

    def bare(self, denoiser: Any, context: Any, null: Any, loss_of: Callable) -> Callable[[], None]:
        """An update of the embedding of one step, on the UNet alone."""
        unet, options, x = self.model.model.diffusion_model, hosting.plain_attention(), self.trajectory[0]
        u = null.clone().requires_grad_(True)
        sigma, following = self.sigmas[0], self.sigmas[1]
        t = (denoiser.sigmas - sigma).abs().argmin().view(1).float()

        def eps(embedding: Any) -> Any:
            return unet(x / (sigma**2 + 1) ** 0.5, t, context=embedding, transformer_options=options)

        with torch.no_grad():
            eps_c = eps(context)

        def loss() -> Any:
            eps_u = eps(u)
            return loss_of(x + (following - sigma) * (eps_u + CFG * (eps_c - eps_u)), following)

        return frame.update(loss, torch.optim.Adam([u], lr=1e-2))

    def updates(self) -> dict[str, dict[str, float]]:
        """One update of null-text optimisation and one of reference guidance, each in the gradient session."""
        from ..core.session.session import Session

        found: dict[str, dict[str, float]] = {}
        steps, sigmas, path, mask = self.settings.steps, self.sigmas, self.trajectory, self.mask
        context, null, target = self.prompt[0][0].clone(), self.negative[0][0].clone(), path[1]

        def whole(x: Any, following: Any) -> Any:
            return ((x - target).square() / (1 + following**2)).mean()

        def inside(x: Any, following: Any) -> Any:
            return ((x - target).square() * mask).sum() / (mask.sum() * 4 * (1 + following**2))

        def body(denoiser: Any, x0: Any) -> None:
            way, rounds = denoiser.of("negative"), self.settings.rounds
            fit = NullText(denoiser, path, sigmas, context, null, NullTextSettings(CFG, MANY, epsilon=0.0), way)
            found["null-text update"] = by_turns(fit.update, self.bare(denoiser, context, null, whole), rounds)
            reference, how = Reference(path, sigmas, mask, range(0, steps)), ReferenceSettings(CFG, MANY)
            guide = ReferenceGuide(denoiser, path[0], reference, [context] * steps, null, how, way)
            found["reference guide update"] = by_turns(guide.update, self.bare(denoiser, context, null, inside), rounds)

        with torch.inference_mode():
            Session(self.model, self.prompt, latents()[0], negative=self.negative).run(body)
        return found

    @torch.inference_mode()
    def run(self, model: Any, negative: list) -> None:
        """A whole sampling."""
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.prompt, negative)
        guider.set_cfg(CFG)
        sampler, zeros = comfy.samplers.sampler_object("euler"), torch.zeros(LATENT)
        guider.sample(latents()[0], zeros, sampler, self.sigmas, disable_pbar=True, seed=0)

    def replays(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Sampling with what the nodes give out, beside stock sampling."""
        from ..core.inversion.host.landing import Landing, attach_landing
        from ..core.reference.host.guidance import guided_steps, masked_negative

        model, negative, mask, path = self.model, self.negative, self.mask, self.trajectory
        sampling = model.get_model_object("model_sampling")
        levels, null = self.sigmas.tolist(), negative[0][0]
        times = windows(levels, sampling.percent_to_sigma)
        nulls = step_wise(negative, [null] * self.settings.steps, times)
        direct = attach_landing(model, Landing(dict(enumerate(path[1:])), tuple(levels), rows=1))
        window = guided_steps(levels, START_PERCENT, END_PERCENT, sampling.percent_to_sigma)
        masked = masked_negative(negative, null.repeat(len(window), 1, 1), mask, window, levels, sampling)
        begin, end = times[window[0]][0], times[window[-1]][1]
        first, last = ({"start_percent": 0.0, "end_percent": begin}, {"start_percent": end, "end_percent": 1.0})
        middle = [{"start_percent": begin, "end_percent": end, "mask": where[0]} for where in (mask, 1 - mask)]
        stock = [[null, {**negative[0][1], **times}] for times in (first, *middle, last)]
        guided = attach_landing(model, Landing({window[0] - 1: path[window[0]]}, tuple(levels), mask))
        for name, ours, bare in (
            ("null-text replay", (model, nulls), negative),
            ("direct replay", (direct, negative), negative),
            ("reference guide replay", (guided, masked), stock),
            ("reference guide replay beside plain sampling", (guided, masked), negative),
        ):
            rounds = self.settings.samplings
            yield name, by_turns(lambda ours=ours: self.run(*ours), lambda bare=bare: self.run(model, bare), rounds)

    def figures(self) -> Iterator[tuple[str, dict[str, float]]]:
        """All of them."""
        yield from self.updates().items()
        yield from self.replays()


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("cost_inversion", arguments, Settings())
    found = run.table(Bench(run.base, run.settings).figures())
    gated = {name: values["ratio"] for name, values in found.items() if not name.endswith("plain sampling")}
    gates = {n: ratio <= (UPDATE_GATE if n.endswith("update") else REPLAY_GATE) for n, ratio in gated.items()}
    return run.costs({**found, "steps": run.settings.steps}, gates)
