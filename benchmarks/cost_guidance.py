"""What SINE's guidance costs beside the bare model calls, in time and in memory, on toyworld.

Bare: in each step the same calls of the same UNet (two prompts of the base model in one batch, and while t > K the
tuned model's one), the mix and the Euler update, without ComfyUI's sampler. Memory: the weights that are held plus the
largest sum of live tensors during a sampling, counted at every operation. One call of three prompts, which a LoRA on
the same module would allow, beside the two that are made: of the bare UNet, at two sizes.

    python toolbox/_load.py benchmarks.cost_guidance --out benchmarks/results/cost_guidance.json
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import frame, hosting
from .hosting import LATENT

END = 0.6
WALL_GATE, MEMORY_GATE = 1.05, 1.20
TUNED = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


@dataclass(frozen=True)
class Settings:
    """Of the sampling, the LoRA, and how often a sampling is timed."""

    steps: int = 10
    cfg: float = 7.5
    rank: int = 16
    rounds: int = 10


def attention_lora(model: Any, rank: int) -> dict[str, Any]:
    """A LoRA on all attention projections, as the fine-tuning node makes it."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in model.model.state_dict().items():
        if name.startswith("diffusion_model.") and name.endswith(TUNED):
            path = name.removesuffix(".weight")
            found[f"{path}.lora_up.weight"] = 1e-3 * torch.randn(weight.shape[0], rank, generator=generator)
            found[f"{path}.lora_down.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
    return found


class Bench:
    """Toyworld, a LoRA-tuned clone of it, and a second loader's copy."""

    def __init__(self, base: Path, settings: Settings) -> None:
        import comfy.sd

        self.model, clip, _ = hosting.small_world(base)
        other, _, _ = hosting.small_world(base)
        self.settings, lora = settings, attention_lora(self.model, settings.rank)
        prompts = ("a photo of a dog in the snow", "", "photo of a sks dog")
        self.edit, self.empty, self.source = hosting.encoded(clip, *prompts)
        with torch.inference_mode():
            self.one_module = comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)[0]
            self.two_modules = comfy.sd.load_lora_for_models(other, None, lora, 1.0, 0.0)[0]
        self.noise = hosting.latents()[0]

    def guided(self, tuned: Any) -> Any:
        """The MODEL that Subject Guidance makes."""
        from ..core.sine.host.guidance import SubjectModel, with_guidance

        return with_guidance(self.model, [SubjectModel(tuned, self.source, 0.3, 0.0, END)])

    @torch.inference_mode()
    def sample(self, model: Any) -> None:
        """Euler steps with ComfyUI's own sampler."""
        import comfy.sample

        comfy.sample.sample(
            model, self.noise, self.settings.steps, self.settings.cfg, "euler", "ddim_uniform", self.edit, self.empty,
            torch.zeros(LATENT), disable_pbar=True, seed=0,
        )  # fmt: skip

    @torch.inference_mode()
    def bare(self, guided: bool) -> None:
        """The same evaluations and arithmetic by hand; the tuned model's call costs what the base model's does."""
        unet, sampling = self.model.model.diffusion_model, self.model.get_model_object("model_sampling")
        sigmas, limit = hosting.levels(self.model, self.settings.steps), sampling.percent_to_sigma(END)
        both = torch.cat([self.edit[0][0], self.empty[0][0]])
        x = self.noise * sigmas[0]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            t, scaled = sampling.timestep(sigma)[None].float(), x / (sigma**2 + 1) ** 0.5
            c, u = unet(scaled.repeat(2, 1, 1, 1), t.repeat(2), context=both).chunk(2)
            if guided and sigma > limit:
                c = 0.7 * c + 0.3 * unet(scaled, t, context=self.source[0][0])
            x = x + (u + self.settings.cfg * (c - u)) * (following - sigma)

    @torch.inference_mode()
    def calls(self, side: int, *prompts: int) -> None:
        """Calls of the bare UNet with so many prompts each."""
        for count in prompts:
            x, t = torch.ones(count, LATENT[1], side, side), torch.full((count,), 500.0)
            self.model.model.diffusion_model(x, t, context=self.edit[0][0].repeat(count, 1, 1))

    def figures(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Times with their ratios, and the memory."""
        weights = sum(p.numel() * p.element_size() for p in self.model.model.parameters())
        plain = weights + frame.most_alive(lambda: self.sample(self.model))
        for name, tuned, held in (("one module", self.one_module, 1), ("two modules", self.two_modules, 2)):
            model = self.guided(tuned)
            yield f"guided sampling, {name}", self.timed(model, True)
            memory = held * weights + frame.most_alive(lambda m=model: self.sample(m))
            yield f"memory, {name}", {"ours": memory, "plain sampling": plain, "ratio": memory / plain}
        yield "plain sampling", self.timed(self.model, False)
        for side in (LATENT[-1], 32):
            one, two = (functools.partial(self.calls, side, *prompts) for prompts in ((3,), (2, 1)))
            yield f"one call of three prompts, {8 * side} px", frame.by_turns(one, two, self.settings.rounds)

    def timed(self, model: Any, guided: bool) -> dict[str, float]:
        """A sampling beside the bare calls."""
        return frame.by_turns(lambda: self.sample(model), lambda: self.bare(guided), self.settings.rounds)


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("cost_guidance", arguments, Settings())
    found = run.table(Bench(run.base, run.settings).figures())
    gates = {name: WALL_GATE for name in found if name.startswith("guided")} | {"memory, one module": MEMORY_GATE}
    return run.costs(found, {name: found[name]["ratio"] <= gate for name, gate in gates.items()})
