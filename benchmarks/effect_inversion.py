"""Does guided sampling come back to an inverted picture, by which way, and at what cost? On the small world, counted.

Held-out scenes are encoded, inverted with their captions and sampled again at cfg 7.5, 50 steps of euler on
ddim_uniform. PSNR is measured against the source picture, for the autoencoder's round trip too: that is the most that
any way can reach. Passes of the UNet are counted at the network itself, a row of a batch each; a null-text run also
counts the session's probe. The narrow form of the small world is used: the same function as the checkpoint, at a
fraction of the cost.

    python toolbox/_load.py benchmarks.effect_inversion --out benchmarks/results/effect_inversion.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import effect_sine, hosting

if TYPE_CHECKING:
    from ..core.inversion.ddim import Label
    from ..core.inversion.null_text import Method, Start

STEPS, CFG, SCHEDULER = 50, 7.5, "ddim_uniform"
ROUND_TRIP, PUBLISHED, CHEAP = "autoencoder", "null-text, published", "null-text from the prompt"
LABELS: tuple[Label, ...] = ("published", "fixed point")  # the ways back are from the first
LOST_GATE = 0.5  # dB below the autoencoder's round trip
EQUAL_GATE = 0.1  # dB: the cheap form may be so much below the published one
PASSES_GATE = 3.0


@dataclass
class Count:
    """Passes of one picture's row through the UNet."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def counted(unet: Any) -> Iterator[Count]:
    """Count what goes through the network, and what comes back."""
    count = Count()

    def seen(_module: Any, _inputs: Any, output: Any) -> None:
        rows = output.shape[0]
        count.forward += rows
        if output.requires_grad:

            def came_back(_gradient: Any) -> None:
                count.backward += rows

            output.register_hook(came_back)

    handle = unet.register_forward_hook(seen)
    try:
        yield count
    finally:
        handle.remove()


class Bench:
    """The small world's models, and the pack's own inversion and ways back on them."""

    def __init__(self) -> None:
        import comfy.samplers

        from ..toyworld import narrow

        self.world = narrow.load_narrow()
        sampling = self.world.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, STEPS)
        self.empty = self.conditioning("")

    def conditioning(self, prompt: str) -> list:
        return [[self.world.encode(prompt), {}]]

    def measured(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What work() gives, with its seconds and passes."""
        import torch

        with torch.inference_mode(), counted(self.world.model.model.diffusion_model) as count:
            began = time.perf_counter()
            found = work()
            seconds = time.perf_counter() - began
        return found, {"seconds": seconds, **vars(count)}

    def sampled(self, model: Any, positive: list, negative: list, start: Any, cfg: float) -> Any:
        """The picture [1, 96, 96, 3] that a start leads to."""
        import comfy.samplers
        import torch

        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
            sampler, nothing = comfy.samplers.sampler_object("euler"), torch.zeros_like(start)
            return self.world.vae.decode(guider.sample(nothing, start, sampler, self.sigmas, disable_pbar=True, seed=0))

    def row(self, seed: int) -> dict[str, Any]:
        """All ways back to one scene."""
        import torch

        from ..core.inversion.ddim import ITERATIONS
        from ..core.inversion.host.ddim import inverted, start_latent
        from ..core.inversion.host.null_text import way_back
        from ..core.inversion.null_text import NullTextSettings
        from ..toyworld import world

        scene, model = world.scene(seed, from_held_out=True), self.world.model
        picture = torch.from_numpy(scene.image)[None].float() / 255
        positive = self.conditioning(scene.caption)

        def psnr(found: Any) -> float:
            return float(-10 * (found - picture).square().mean().log10())

        with torch.inference_mode():
            latent = {"samples": self.world.vae.encode(picture)}
            row: dict[str, Any] = {"caption": scene.caption, ROUND_TRIP: psnr(self.world.vae.decode(latent["samples"]))}
        for label in reversed(LABELS):
            trajectory, cost = self.measured(
                lambda label=label: inverted(model, positive, latent, None, None, self.sigmas, label, ITERATIONS)
            )
            start = start_latent(model, trajectory)["samples"]
            row[f"{label}, unguided"] = {"psnr": psnr(self.sampled(model, positive, self.empty, start, 1.0)), **cost}
        row["plain"] = {"psnr": psnr(self.sampled(model, positive, self.empty, start, CFG))}
        ways: dict[str, tuple[Method, Start]] = {
            "negative prompt": ("negative prompt", "prompt"),
            "direct": ("direct", "empty prompt"),
            PUBLISHED: ("null-text", "empty prompt"),
            CHEAP: ("null-text", "prompt"),
        }
        for name, (method, first) in ways.items():
            found, cost = self.measured(
                lambda method=method, first=first: way_back(
                    model, positive, self.empty, trajectory, method, NullTextSettings(CFG), first
                )
            )
            picture_again = self.sampled(found.model, positive, found.negative, start, CFG)
            row[name] = {"psnr": psnr(picture_again), "updates": len(found.losses or []), **cost}
        return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the pictures, the distance to the round trip with its interval, and the gates."""
    from ..core.vision.measures import paired_interval

    ways = [name for name, value in rows[0].items() if isinstance(value, dict)]
    mean: dict[str, Any] = {}
    for name in ways:
        mean[name] = {key: sum(row[name][key] for row in rows) / len(rows) for key in rows[0][name]}
        lost = [row[ROUND_TRIP] - row[name]["psnr"] for row in rows]
        mean[name]["below the round trip"] = {**vars(paired_interval(lost)), "worst": max(lost)}
    fewer = mean[PUBLISHED]["backward"] / mean[CHEAP]["backward"]
    gates = {
        "null-text comes back": mean[PUBLISHED]["below the round trip"]["mean"] <= LOST_GATE,
        "and from the prompt": mean[CHEAP]["below the round trip"]["mean"] <= LOST_GATE,
        "from the prompt as near": mean[PUBLISHED]["psnr"] - mean[CHEAP]["psnr"] <= EQUAL_GATE,
        "at a third of the backward passes": fewer >= PASSES_GATE,
    }
    return {
        "pictures": len(rows),
        ROUND_TRIP: sum(row[ROUND_TRIP] for row in rows) / len(rows),
        "mean": mean,
        "backward passes, published over cheap": fewer,
        "gates": gates,
        "gates held": all(gates.values()),
    }


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_inversion")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each picture's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench, path = Bench(), options.rows
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for seed in range(len(rows), options.pictures):
        rows.append(bench.row(seed))
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        shown = {name: f"{value['psnr']:.2f}" for name, value in rows[-1].items() if isinstance(value, dict)}
        sys.stdout.write(f"{len(rows):3d} {rows[-1]['caption']}: {rows[-1][ROUND_TRIP]:.2f} {shown}\n")
        sys.stdout.flush()
    rows = rows[: options.pictures]
    result = summary(rows)
    effect_sine.write(
        options.out,
        {
            "settings": {"cfg": CFG, "steps": STEPS, "scheduler": SCHEDULER, "threads": options.threads},
            "summary": result,
            "rows": rows,
        },
    )
    for name, values in result["mean"].items():
        sys.stdout.write(f"{name}: {values}\n")
    sys.stdout.write(
        f"{ROUND_TRIP} {result[ROUND_TRIP]:.2f}, passes {result['backward passes, published over cheap']:.2f}"
        f", gates {result['gates']}\n"
    )
    return int(not result["gates held"])
