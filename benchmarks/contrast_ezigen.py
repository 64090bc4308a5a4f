"""What do EZIGen's loops take of the contrast, at exact noise level and at the published one? On toyworld.

Contrast is the standard deviation of an image's RGB values. For each held-out subject images are sampled once, and then
go through nine loops at both noise levels, and beside that nine times through the autoencoder alone; what a loop loses
beyond the autoencoder's part counts. Published settings: 50 steps, the last 0.4 of them.

The published level leaves 0.966 of the signal in what a loop starts from. Whether that is seen depends on the network:
toyworld's own knows which contrast its few colours have, and restores it whatever it starts from. How much it does is
measured on real renders with 0.7 of their contrast, after one loop at exact level: 1 of the renders' own if it knows
it, 0.7 if it looks. A network of photographs has to look. Therefore the same loops also run with a perfect network that
knows everything of the first images but their contrast: of a noisy latent x it sees c z best, z the clean one and
c = <x, z> / <z, z>. Sampler, levels, autoencoder and images are the same.

    python toolbox/_load.py benchmarks.contrast_ezigen --out benchmarks/results/contrast_ezigen.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import effect_ezigen, frame
from .subjects import Case, rendered

FLAT, LOSS_GATE, FACTOR_GATE = 0.7, 0.03, 3.0
LEVELS = {"exact": False, "published": True}
OWN, PERFECT = "own network", "perfect network"


@dataclass(frozen=True)
class Settings:
    """The published ones."""

    loops: int = 9
    steps: int = 50
    ratio: float = 0.4
    cfg: float = 7.5
    samples: int = 4


def spread(images: Any) -> float:
    """Mean standard deviation of RGB values, of images [N, 3, H, W]."""
    return float(images.flatten(1).std(1).mean())


class Bench(effect_ezigen.Bench):
    """The pack's own stages, starting from images."""

    @torch.inference_mode()
    def round_trips(self, images: Any, count: int) -> Any:
        """Images after so many ways through the autoencoder."""
        for _ in range(count):
            images = self.decoded(self.world.vae.encode(images.movedim(1, -1)))
        return images

    def looking(self, images: Any) -> Any:
        """A MODEL that knows these images [N, 3, H, W], in this order, and has to look for their contrast."""
        model = self.world.model.clone()
        with torch.inference_mode():
            z = model.model.process_latent_in(self.world.vae.encode(images.movedim(1, -1)))

        def denoised(_network: Any, asked: dict[str, Any]) -> Any:
            x = asked["input"]
            known = z.repeat(len(x) // len(z), 1, 1, 1)  # both prompts in one batch
            contrast = (x * known).flatten(1).sum(1) / known.square().flatten(1).sum(1)
            return contrast.view(-1, 1, 1, 1) * known

        model.set_model_unet_function_wrapper(denoised)
        return model

    def row_of(self, case: Case) -> dict[str, Any]:
        """All figures of one subject."""
        subject, loops, ratio = self.subject(case), self.settings.loops, self.settings.ratio
        (first,) = self.images(case, subject, ratio, 0)
        before, alone = spread(first), spread(self.round_trips(first, loops))
        row: dict[str, Any] = {"bare": 1 - alone / before}
        for network, model in {OWN: None, PERFECT: self.looking(first)}.items():
            for level, published in LEVELS.items():
                found = self.images(case, subject, ratio, loops, first, model, published_level=published)
                each = [spread(images) for images in found]
                row |= {f"{network}, {level}": (alone - each[-1]) / before, f"{network}, {level}, by loop": each}
        seeds = [case.seed + 1 + n for n in range(self.settings.samples)]
        real = rendered(case.identity, case.target_place, *seeds).movedim(-1, 1)
        middle = real.mean((1, 2, 3), keepdim=True)
        after = spread(self.images(case, subject, ratio, 1, middle + FLAT * (real - middle))[-1])
        row["renders with less contrast, after a loop"] = after / spread(self.round_trips(real, 1))
        return row


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means, the published level's loss beyond the exact one's, and the gates."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    mean = {name: frame.mean(row[name] for row in rows) for name in names}
    exact, published = (f"{PERFECT}, {level}" for level in LEVELS)
    more = frame.interval(row[published] - row[exact] for row in rows)
    gates = {
        "exact level loses little": max(mean[exact], mean[f"{OWN}, exact"]) <= LOSS_GATE,
        "the published level loses more": more["low"] > 0 and mean[published] >= FACTOR_GATE * max(0.0, mean[exact]),
    }
    return frame.gated({"mean": mean, f"{PERFECT}, published - exact": more}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("contrast_ezigen", arguments, Settings(), effect_ezigen.ADAPTER, subjects=24)
    chosen = run.chosen(effect_ezigen.cases)
    rows = run.rows(chosen, lambda: Bench(run.options.adapter, run.settings), Bench.row_of, lambda _case: {})
    return run.judged(rows, summary(rows), flat=True)
