"""What do EZIGen's loops take of the contrast, at exact noise level and at the published one? On the small world.

Contrast is the standard deviation of a picture's RGB values. For each held-out subject pictures are sampled once, and
then go through nine loops at both noise levels, and beside that nine times through the autoencoder alone; what a loop
loses beyond the autoencoder's part counts. Published settings: 50 steps, the last 0.4 of them.

The published level leaves 0.966 of the signal in what a loop starts from. Whether that is seen depends on the network:
the small world's own knows which contrast its few colours have, and restores it whatever it starts from. How much it
does is measured on real renders with 0.7 of their contrast, after one loop at exact level: 1 of the renders' own where
it knows it, 0.7 where it looks. A network of photographs has to look. Therefore the same loops are also run with a
perfect network that knows everything of the first pictures but their contrast: of a noisy latent x it sees c z best,
z the clean one and c = <x, z> / <z, z>. Sampler, levels, autoencoder and pictures are the same.

    python toolbox/_load.py benchmarks.contrast_ezigen --out benchmarks/results/contrast_ezigen.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import effect_ezigen, effect_hiper, hosting
from .effect_ezigen import SAMPLES, say
from .effect_sine import write

LOOPS, STEPS, RATIO, CFG, FLAT = 9, 50, 0.4, 7.5, 0.7
LOSS_GATE, FACTOR_GATE = 0.03, 3.0
LEVELS = {"exact": False, "published": True}
OWN, PERFECT = "own network", "perfect network"


def spread(pictures: Any) -> float:
    """Mean standard deviation of RGB values, of pictures [N, 3, H, W]."""
    return float(pictures.flatten(1).std(1).mean())


class Bench(effect_ezigen.Bench):
    """The pack's own stages, starting from pictures."""

    def looped(
        self, case: effect_hiper.Case, subject: Any, start: Any, loops: int, published: bool = False, model: Any = None
    ) -> Any:
        """`start`, or what a first sampling makes where it is None, and the pictures of each loop, [N, 3, 96, 96]."""
        from ..core.ezigen.host.staged import StagedSettings
        from ..core.ezigen.staged import Loops

        settings = StagedSettings(case.seed, STEPS, CFG, RATIO, Loops(loops, loops), published_level=published)
        return self.pictures(case, subject, settings, start, model)

    def looking(self, pictures: Any) -> Any:
        """A MODEL that knows these pictures [N, 3, H, W], in this order, and has to look for their contrast."""
        import torch

        model = self.world.model.clone()
        with torch.inference_mode():
            z = model.model.process_latent_in(self.world.vae.encode(pictures.movedim(1, -1)))

        def denoised(_network: Any, asked: dict[str, Any]) -> Any:
            x = asked["input"]
            known = z.repeat(len(x) // len(z), 1, 1, 1)  # both prompts in one batch
            contrast = (x * known).flatten(1).sum(1) / known.square().flatten(1).sum(1)
            return contrast.view(-1, 1, 1, 1) * known

        model.set_model_unet_function_wrapper(denoised)
        return model

    def flat_renders(self, case: effect_hiper.Case) -> tuple[Any, Any]:
        """Real renders of the subject in the target place [N, 3, 96, 96], and the same with less contrast."""
        import torch

        from ..toyworld import world

        drawn = [world.render(case.identity, case.target_place, case.seed + 1 + n)[0] for n in range(SAMPLES)]
        pictures = torch.stack([torch.from_numpy(each) for each in drawn]).movedim(-1, 1).float() / 255
        middle = pictures.mean((1, 2, 3), keepdim=True)
        return pictures, middle + FLAT * (pictures - middle)


def row_of(bench: Bench, case: effect_hiper.Case) -> dict[str, Any]:
    """All figures of one subject."""
    subject = bench.subject(case)
    (first,) = bench.looped(case, subject, None, 0)
    before, alone = spread(first), spread(bench.round_trips(first, LOOPS))
    row: dict[str, Any] = {"bare": 1 - alone / before}
    for network, model in {OWN: None, PERFECT: bench.looking(first)}.items():
        for level, published in LEVELS.items():
            each = [spread(found) for found in bench.looped(case, subject, first, LOOPS, published, model)]
            row |= {f"{network}, {level}": (alone - each[-1]) / before, f"{network}, {level}, by loop": each}
    real, flat = bench.flat_renders(case)
    after = spread(bench.looped(case, subject, flat, 1)[-1])
    row["renders with less contrast, after a loop"] = after / spread(bench.round_trips(real, 1))
    return row


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    from ..core.vision.measures import paired_interval
    from ..toyworld.assets import ASSETS

    parser = argparse.ArgumentParser(prog="benchmarks.contrast_ezigen")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "adapter.safetensors", help="in the narrow form")
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench, rows = Bench(options.adapter), []
    for case in effect_ezigen.cases(options.subjects):
        rows.append(row_of(bench, case))
        shown = {key: round(value, 4) for key, value in rows[-1].items() if isinstance(value, float)}
        say(f"{len(rows):3d} {json.dumps(shown)}")
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if isinstance(rows[0][key], float)}
    exact, published = (f"{PERFECT}, {level}" for level in LEVELS)
    more = paired_interval([row[published] - row[exact] for row in rows])
    gates = {
        "exact level loses little": max(mean[exact], mean[f"{OWN}, exact"]) <= LOSS_GATE,
        "the published level loses more": more.low > 0 and mean[published] >= FACTOR_GATE * max(0.0, mean[exact]),
    }
    result = {"mean": mean, f"{PERFECT}, published - exact": vars(more), "gates": gates}
    say(json.dumps(result, indent=1))
    settings = {"loops": LOOPS, "steps": STEPS, "ratio": RATIO, "cfg": CFG, "samples": SAMPLES}
    write(options.out, {"settings": settings, **result, "rows": rows})
    return int(not all(gates.values()))
