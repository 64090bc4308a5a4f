"""What the pack costs beside the bare model calls, on toyworld, on this machine.

Bare: the same forward, backward and optimiser step on the same modules, without ComfyUI's executor and guider.

    python toolbox/_load.py benchmarks.cost --out benchmarks/results/cost.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.embedding.hiper import HiPer, HiPerSettings
from ..core.prompt.conditioning import apply_embedding, with_tail
from . import frame, hosting
from .frame import by_turns, held_for_backward
from .hosting import LATENT

GATES = {"train step": 1.15, "sampling": 1.03}
IMPORT_GATE = 0.05  # seconds
MINUTES_GATE = 6.0  # for 1000 training steps on two cores


@dataclass(frozen=True)
class Settings:
    """How often each is timed; imports: new processes that load the pack."""

    rounds: int = 20
    imports: int = 5


def training(model: Any, prompt: list, rounds: int) -> dict[str, dict[str, float]]:
    """One HiPer update in the gradient session against the same update on the bare UNet."""
    from ..core.session.checkpointing import checkpointed
    from ..core.session.session import Session

    found: dict[str, dict[str, float]] = {}
    context, options = prompt[0][0].clone(), hosting.plain_attention()

    def body(denoiser: Any, x0: Any) -> None:
        unet = model.model.diffusion_model
        fit = HiPer(denoiser, x0, context, context[0, -5:], HiPerSettings())
        h = context[0, -5:].clone().requires_grad_(True)
        adam = torch.optim.Adam([h], lr=5e-3)
        generator = torch.Generator().manual_seed(0)

        def bare_loss() -> Any:
            t = torch.randint(0, 1000, (1,), generator=generator)
            noise = torch.randn(LATENT, generator=generator)
            sigma = denoiser.sigmas[t]
            x = (x0 + sigma * noise) / (sigma**2 + 1) ** 0.5
            predicted = unet(x, t.float(), context=with_tail(context, h), transformer_options=options)
            return (predicted - noise).square().mean()

        found["train step"] = by_turns(fit.update, frame.update(bare_loss, adam), rounds)
        ours, plain = held_for_backward(lambda: fit.loss(*fit.draw())), held_for_backward(bare_loss)
        with checkpointed(unet):
            less = held_for_backward(lambda: fit.loss(*fit.draw()))
        found["bytes held for backward"] = {
            "ours": ours, "bare": plain, "ratio": ours / plain, "checkpointed": less, "weights": frame.weights(unet),
        }  # fmt: skip

    with torch.inference_mode():
        Session(model, prompt, hosting.latents()[0]).run(body)
    return found


def sampling(model: Any, prompt: list, negative: list, rounds: int) -> dict[str, float]:
    """Ten steps of ComfyUI's sampler with an embedding in the prompt against without."""
    import comfy.sample

    noise = hosting.latents()[0]
    embedded = apply_embedding(prompt, torch.randn(1, 5, prompt[0][0].shape[-1]), 0.8)

    @torch.inference_mode()
    def run(positive: list) -> None:
        comfy.sample.sample(
            model, noise, 10, 4.0, "euler", "normal", positive, negative, torch.zeros(LATENT), disable_pbar=True
        )

    return by_turns(lambda: run(embedded), lambda: run(prompt), rounds)


IMPORT = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {comfy!r}); sys.argv = ["x", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import utils.install_util, nodes, server, latent_preview, comfy_api.latest, comfy_execution.graph_utils
began = time.perf_counter()
spec = importlib.util.spec_from_file_location("likeness", {pack!r}, submodule_search_locations=[{root!r}])
module = sys.modules["likeness"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
async def load():
    extension = await module.comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list(): node.GET_SCHEMA()
asyncio.run(load())
print(time.perf_counter() - began)
"""


def import_seconds(rounds: int) -> float:
    """Median time that loading the pack adds to a ComfyUI that is already there, each in a new process."""
    root = Path(__file__).resolve().parents[1]
    code = IMPORT.format(comfy=os.environ["COMFYUI_PATH"], pack=str(root / "__init__.py"), root=str(root))
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def figures(base: Path, how: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """A training step, a sampling and the import."""
    model, clip, _ = hosting.small_world(base)
    prompt, negative = hosting.encoded(clip, "a photo of a dog in the snow", "")
    yield from training(model, prompt, how.rounds).items()
    yield "sampling", sampling(model, prompt, negative, how.rounds)
    yield "import", {"ours": import_seconds(how.imports)}


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("cost", arguments, Settings())
    found = run.table(figures(run.base, run.settings))
    minutes = found["train step"]["ours"] * 1000 / 60
    frame.say(f"1000 training steps: {minutes:.1f} minutes")
    gates = {name: found[name]["ratio"] <= gate for name, gate in GATES.items()}
    gates |= {"import": found["import"]["ours"] <= IMPORT_GATE, "1000 training steps": minutes <= MINUTES_GATE}
    return run.costs(found, gates)
