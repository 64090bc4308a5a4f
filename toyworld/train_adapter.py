"""Stage "adapter": train EZIGen's adapter for the narrow UNet on pairs of pictures, by the pack's own loss.

Only the adapter learns. Its matrices are trained by Muon, the rest by Adam, as the small world's other networks: the
published AdamW at 1e-4 is for 200,000 samples of a large one.
"""

from __future__ import annotations

import argparse
import time

import torch

from ..core.ezigen.adapter import Adapter
from ..core.ezigen.train import DROP, Sample, draw, errors
from . import assets, comfyui, training, world
from .pairs import FILE, subject_prompt
from .training import RANK, RANKS, WORK, log

SEED = 20
START = 0.3
EVERY = 25  # steps from one line of the log to the next


class Pairs:
    """The samples by their number in the run; every pass over the pairs has an order of its own."""

    def __init__(self, text: torch.nn.Module, subject_contexts: torch.Tensor) -> None:
        if not (WORK / FILE).exists():
            raise RuntimeError("The pairs are not rendered yet: run `python toyworld/run.py pairs` first.")
        self.stored = torch.load(WORK / FILE, weights_only=True, mmap=True)
        self.text, self.subject_contexts = text, subject_contexts

    def __call__(self, numbers: list[int]) -> list[Sample]:
        """Samples of the run."""
        count = len(self.stored["scenes"])
        chosen = torch.tensor([_shuffled(number // count, count)[number % count] for number in numbers])
        with torch.no_grad():
            contexts = self.text(self.stored["rows"][chosen].long())
        about = self.subject_contexts[self.stored["classes"][chosen]]
        scenes, subjects = (self.stored[name][chosen].float() for name in ("scenes", "subjects"))
        return [
            Sample(scene, context, subject[None], prompt[None])
            for scene, context, subject, prompt in zip(scenes, contexts, subjects, about, strict=True)
        ]


_orders: dict[int, torch.Tensor] = {}


def _shuffled(turn: int, count: int) -> torch.Tensor:
    if turn not in _orders:
        _orders[turn] = torch.randperm(count, generator=torch.Generator().manual_seed(SEED * 1000 + turn))
    return _orders[turn]


@torch.no_grad()
def start_gently(adapter: Adapter, share: float = START) -> None:
    """From the published start to one that changes little: the same attention, with nothing of it added yet.

    Norm and w are made smaller and what reads them larger by as much, and the outputs are zero. The published start
    adds a second self-attention to every block at once, which takes a long training to make up for.
    """
    for name, parameter in adapter.published_parameters().items():
        if ".to_out." in name:
            parameter.zero_()
        else:
            parameter.mul_(1 / share if parameter.ndim == 2 else share)


def split_parameters(adapter: Adapter) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices for Muon, the rest for Adam)."""
    parameters = list(adapter.published_parameters().values())
    return [each for each in parameters if each.ndim == 2], [each for each in parameters if each.ndim < 2]


def main(arguments: list[str]) -> None:
    """Train; adapter.safetensors (averaged weights, published names) is rewritten once a minute."""
    parser = argparse.ArgumentParser(prog="run.py adapter")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=8, help="samples per process")
    parser.add_argument("--rate", type=float, default=0.01, help="Muon's")
    parser.add_argument("--adam-rate", type=float, default=2e-3)
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the steps at full rate")
    options = parser.parse_args(arguments)
    training.start()
    comfyui.prepare()
    from ..core.ezigen.host.layers import UNet, new_adapter
    from .narrow import load_narrow

    narrow = load_narrow()
    narrow.text.requires_grad_(False)
    base = narrow.model.model
    adapter = new_adapter(base)
    start_gently(adapter)
    network = UNet(base, adapter)
    pairs = Pairs(narrow.text, torch.cat([narrow.encode(subject_prompt(name)) for name in world.CLASSES]))
    optimiser = training.Muon(*split_parameters(adapter), rate=options.rate, adam_rate=options.adam_rate)
    average = training.Average(optimiser.parameters, decay=0.998)
    keeper = training.Keeper("adapter", {"adapter": adapter, "optimiser": optimiser, "average": average})
    first, began, recent = keeper.resume(), time.time(), []
    log(sum(parameter.numel() for parameter in adapter.parameters()), "parameters")
    for step in range(first, options.steps):
        start = (step * RANKS + RANK) * options.batch
        numbers = list(range(start, start + options.batch))
        error = errors(network, pairs(numbers), [draw(SEED, number, DROP) for number in numbers]).mean()
        error.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=60, decay_from=options.decay_from))
        average.update(step)
        recent.append(float(error.detach()))
        if (step + 1) % EVERY == 0:
            speed = (step + 1 - first) / (time.time() - began)
            log(step + 1, f"noise error {sum(recent) / len(recent):.4f}", f"{speed:.2f} steps/s")
            recent.clear()
        if keeper.save(step + 1, now=step + 1 == options.steps):
            average.swap()
            assets.write(
                "adapter",
                {name: value.detach().clone() for name, value in adapter.published_parameters().items()},
                WORK,
            )
            average.swap()
