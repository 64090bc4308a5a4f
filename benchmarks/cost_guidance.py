"""What SINE's guidance costs beside the bare model calls, in time and in memory, on the small world.

Bare: in each step the same calls of the same UNet (two prompts of the base model in one batch, and while t > K the
tuned model's one), the mix and the Euler update, without ComfyUI's sampler. Timed by turns in one process. Memory: the
weights that are held plus the largest sum of live tensors during a sampling, counted at every operation.

    python toolbox/_load.py benchmarks.cost_guidance --out benchmarks/results/cost_guidance.json
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import hosting
from .cost import LATENT, by_turns

STEPS, CFG, END = 10, 7.5, 0.6
RANK = 16
WALL_GATE, MEMORY_GATE = 1.05, 1.20


def peak_bytes(run: Callable[[], object]) -> int:
    """The largest sum of bytes of the tensors that run() itself makes and that are alive at once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    live: dict[int, int] = {}
    peak = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {value.untyped_storage().data_ptr() for value in tree_flatten((args, kwargs))[0] if _tensor(value)}
            for value in filter(_tensor, tree_flatten(out)[0]):
                storage = value.untyped_storage()
                if storage.data_ptr() in known or storage.data_ptr() in live or not storage.nbytes():
                    continue
                live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, live.pop, storage.data_ptr(), None)
            peak[0] = max(peak[0], sum(live.values()))
            return out

    with Count():
        run()
    return peak[0]


def _tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def attention_lora(model) -> dict[str, Any]:
    """A LoRA of rank 16 on all attention projections, as Fine-Tune On Picture makes it."""
    import torch

    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in model.model.state_dict().items():
        if name.startswith("diffusion_model.") and name.endswith(
            ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
        ):
            path = name.removesuffix(".weight")
            found[f"{path}.lora_up.weight"] = 1e-3 * torch.randn(weight.shape[0], RANK, generator=generator)
            found[f"{path}.lora_down.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
    return found


class Bench:
    """The small world, a LoRA-tuned clone of it, and a second loader's copy."""

    def __init__(self, base: Path) -> None:
        import comfy.sd
        import torch

        self.model, clip, _ = hosting.small_world(base)
        other, _, _ = hosting.small_world(base)
        lora = attention_lora(self.model)
        with torch.inference_mode():
            self.edit, self.empty, self.source = (
                clip.encode_from_tokens_scheduled(clip.tokenize(text))
                for text in ("a photo of a dog in the snow", "", "photo of a sks dog")
            )
            self.one_module = comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)[0]
            self.two_modules = comfy.sd.load_lora_for_models(other, None, lora, 1.0, 0.0)[0]
        self.noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))

    def guided(self, tuned):
        """The MODEL that Subject Guidance makes."""
        from ..core.sine.host.guidance import SubjectModel, guided

        return guided(self.model, [SubjectModel(tuned, self.source, 0.3, 0.0, END)])

    def sample(self, model) -> None:
        """Ten Euler steps with ComfyUI's own sampler."""
        import comfy.sample
        import torch

        with torch.inference_mode():
            comfy.sample.sample(
                model, self.noise, STEPS, CFG, "euler", "ddim_uniform", self.edit, self.empty,
                torch.zeros(LATENT), disable_pbar=True, seed=0,
            )  # fmt: skip

    def bare(self, guided: bool) -> None:
        """The same evaluations and arithmetic by hand; the tuned model's call costs what the base model's does."""
        import comfy.samplers
        import torch

        unet, sampling = self.model.model.diffusion_model, self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
        limit = sampling.percent_to_sigma(END)
        both = torch.cat([self.edit[0][0], self.empty[0][0]])
        with torch.inference_mode():
            x = self.noise * sigmas[0]
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                t, scaled = sampling.timestep(sigma)[None].float(), x / (sigma**2 + 1) ** 0.5
                c, u = unet(scaled.repeat(2, 1, 1, 1), t.repeat(2), context=both).chunk(2)
                if guided and sigma > limit:
                    c = 0.7 * c + 0.3 * unet(scaled, t, context=self.source[0][0])
                x = x + (u + CFG * (c - u)) * (following - sigma)


def figures(bench: Bench) -> dict[str, dict[str, float]]:
    """Times with their ratios, and the memory."""
    found: dict[str, dict[str, float]] = {}
    weights = sum(p.numel() * p.element_size() for p in bench.model.model.parameters())
    plain = weights + peak_bytes(lambda: bench.sample(bench.model))
    for name, tuned, held in (("one module", bench.one_module, 1), ("two modules", bench.two_modules, 2)):
        model = bench.guided(tuned)
        found[f"guided sampling, {name}"] = by_turns(lambda m=model: bench.sample(m), lambda: bench.bare(True), 10)
        memory = held * weights + peak_bytes(lambda m=model: bench.sample(m))
        found[f"memory, {name}"] = {"ours": memory, "plain sampling": plain, "ratio": memory / plain}
    found["plain sampling"] = by_turns(lambda: bench.sample(bench.model), lambda: bench.bare(False), 10)
    return found


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost_guidance")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    base = hosting.start(options.threads)
    import torch

    found = figures(Bench(base))
    for name, values in found.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
    if options.out:
        content = {**found, "torch": torch.__version__, "threads": options.threads}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    gates = {name: WALL_GATE for name in found if name.startswith("guided")} | {"memory, one module": MEMORY_GATE}
    missed = [name for name, gate in gates.items() if found[name]["ratio"] > gate]
    sys.stdout.write(f"missed gates: {', '.join(missed) or 'none'}\n")
    return int(bool(missed))
