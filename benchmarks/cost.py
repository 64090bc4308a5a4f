"""What the pack costs beside the bare model calls, on the small world, on this machine.

Bare: the same forward, backward and optimiser step on the same modules, without ComfyUI's executor and guider. Both
run by
turns in one process, so that a slow moment of the machine hits both; the medians' ratio counts, not the seconds.

    python toolbox/_load.py benchmarks.cost --out benchmarks/results/cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import hosting

ROUNDS = 20
LATENT = (1, 4, 12, 12)
GATES = {"train step": 1.15, "sampling": 1.03}
IMPORT_GATE = 0.05  # seconds
MINUTES_GATE = 6.0  # for 1000 training steps on two cores


def by_turns(ours: Callable[[], object], bare: Callable[[], object], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of both, after two warm-up rounds, and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(rounds + 2):
        pair = [("ours", ours), ("bare", bare)]
        for name, run in pair if turn % 2 else reversed(pair):
            began = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["ours"] / medians["bare"]}


def held_for_backward(run: Callable[[], object]) -> int:
    """Peak bytes that autograd keeps while run() goes forward, each storage once."""
    import torch

    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def training(model, prompt) -> dict[str, dict[str, float]]:
    """One HiPer update in the gradient session against the same update on the bare UNet."""
    import torch
    from comfy.ldm.modules.attention import attention_pytorch

    from ..core.embedding.hiper import HiPer, HiPerSettings
    from ..core.prompt.conditioning import with_tail
    from ..core.session.session import Session
    from ..core.session.weights import checkpointed

    found: dict[str, dict[str, float]] = {}
    context = prompt[0][0].clone()
    latent = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))

    def body(denoiser, x0):
        unet = model.model.diffusion_model
        fit = HiPer(denoiser, x0, context, context[0, -5:], HiPerSettings())
        h = context[0, -5:].clone().requires_grad_(True)
        adam = torch.optim.Adam([h], lr=5e-3)
        generator = torch.Generator().manual_seed(0)
        options = {"optimized_attention_override": lambda _chosen, *a, **k: attention_pytorch(*a, **k)}

        def bare_loss():
            t = torch.randint(0, 1000, (1,), generator=generator)
            noise = torch.randn(LATENT, generator=generator)
            sigma = denoiser.sigmas[t]
            x = (x0 + sigma * noise) / (sigma**2 + 1) ** 0.5
            predicted = unet(x, t.float(), context=with_tail(context, h), transformer_options=options)
            return (predicted - noise).square().mean()

        def bare():
            loss = bare_loss()
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()

        found["train step"] = by_turns(lambda: fit.update(), bare)
        ours, plain = held_for_backward(lambda: fit.loss(*fit.draw())), held_for_backward(bare_loss)
        weights = sum(p.numel() * p.element_size() for p in [*unet.parameters(), *unet.buffers()])
        with checkpointed(unet):
            less = held_for_backward(lambda: fit.loss(*fit.draw()))
        found["bytes held for backward"] = {
            "ours": ours, "bare": plain, "ratio": ours / plain, "checkpointed": less, "weights": weights,
        }  # fmt: skip

    with torch.inference_mode():
        Session(model, prompt, latent).run(body)
    return found


def sampling(model, prompt, negative) -> dict[str, float]:
    """Ten steps of ComfyUI's sampler with an embedding in the prompt against without."""
    import comfy.sample
    import torch

    from ..core.prompt.conditioning import apply_embedding

    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
    embedded = apply_embedding(prompt, torch.randn(1, 5, prompt[0][0].shape[-1]), 0.8)

    def run(positive):
        with torch.inference_mode():
            comfy.sample.sample(
                model, noise, 10, 4.0, "euler", "normal", positive, negative, torch.zeros(LATENT), disable_pbar=True
            )

    return by_turns(lambda: run(embedded), lambda: run(prompt))


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


def import_seconds(rounds: int = 5) -> float:
    """Median time that loading the pack adds to a ComfyUI that is already there, each in a new process."""
    import os

    root = Path(__file__).resolve().parents[1]
    code = IMPORT.format(comfy=os.environ["COMFYUI_PATH"], pack=str(root / "__init__.py"), root=str(root))
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    model, clip, _ = hosting.small_world(hosting.start(options.threads))
    import torch

    with torch.inference_mode():
        prompt, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a photo of a dog in the snow", "")
        )
    figures = {**training(model, prompt), "sampling": sampling(model, prompt, negative)}
    figures["import"] = {"ours": import_seconds()}
    for name, values in figures.items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({**figures, "torch": torch.__version__, "threads": options.threads}, indent=1) + "\n"
        )
    minutes = figures["train step"]["ours"] * 1000 / 60
    sys.stdout.write(f"1000 training steps: {minutes:.1f} minutes\n")
    missed = [name for name, gate in GATES.items() if figures[name]["ratio"] > gate]
    missed += ["import"] if figures["import"]["ours"] > IMPORT_GATE else []
    missed += ["1000 training steps"] if minutes > MINUTES_GATE else []
    sys.stdout.write(f"missed gates: {', '.join(missed) or 'none'}\n")
    return int(bool(missed))
