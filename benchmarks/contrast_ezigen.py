"""What do EZIGen's loops take of the contrast, at exact noise level and at the published one? On the small world.

Contrast is the standard deviation of a picture's RGB values. For each held-out subject pictures are sampled once, and
then go through nine loops at both noise levels, and beside that nine times through the autoencoder alone; what a loop
loses beyond the autoencoder's part counts. Published settings: 50 steps, the last 0.4 of them.

The published level leaves 0.966 of the signal in what a loop starts from. Whether that is seen after nine loops depends
on the network: how much of a picture's contrast it takes from its start, and how much it knows already. Therefore two
more figures: the contrast of the network's first look at the picture (its x0 in the first step of a loop), published
by exact; and real renders with 0.7 of their contrast after one loop at exact level: 0.7 of the renders' own where the
network takes it from the start, 1 where it knows it.

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
KINDS = {"exact": False, "published": True}


def spread(pictures: Any) -> float:
    """Mean standard deviation of RGB values, of pictures [N, 3, H, W]."""
    return float(pictures.flatten(1).std(1).mean())


class Bench(effect_ezigen.Bench):
    """The pack's own stages, starting from pictures."""

    def looped(self, case: effect_hiper.Case, subject: Any, start: Any, loops: int, published: bool = False) -> Any:
        """`start`, or what a first sampling makes where it is None, and the pictures of each loop, [N, 3, 96, 96]."""
        from ..core.host.staged_sampling import StagedSettings
        from ..core.staged_sampling import Loops

        settings = StagedSettings(case.seed, STEPS, CFG, RATIO, Loops(loops, loops), published_level=published)
        return self.pictures(case, subject, settings, start)

    def first_look(self, case: effect_hiper.Case, subject: Any, start: Any, published: bool) -> Any:
        """x0 [N, 4, 12, 12] that the network sees in the first step of a loop from these pictures, with the prompt."""
        import torch
        from comfy.samplers import calculate_sigmas

        from ..core.host.session import predicting
        from ..core.host.staged_sampling import stock_noise
        from ..core.staged_sampling import TIMESTEPS, renoised, split

        sampling: Any = self.world.model.get_model_object("model_sampling")
        sigma = split(calculate_sigmas(sampling, effect_ezigen.SCHEDULER, STEPS), RATIO)[1][0]
        told = sampling.sigmas[round(RATIO * TIMESTEPS)] if published else None
        found: list[Any] = []

        def body(denoiser: Any, x0: Any) -> None:
            x = renoised(x0, stock_noise(x0, case.seed), sigma, told)
            found.append(denoiser.denoised(x, sigma.expand(len(x))))

        with torch.inference_mode():
            latents = self.world.vae.encode(start.movedim(1, -1))
            prompt = self.conditioning(case.prompt(case.target_place))
            predicting(self.adapted(subject), prompt, latents, body)
        return found[0]

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
    found: dict[str, Any] = {"bare": 1 - alone / before}
    for name, published in KINDS.items():
        each = [spread(pictures) for pictures in bench.looped(case, subject, first, LOOPS, published)]
        found |= {name: (alone - each[-1]) / before, f"{name}, by loop": each}
    exact, published = (bench.first_look(case, subject, first, level) for level in KINDS.values())
    found["first look, published by exact"] = spread(published) / spread(exact)
    real, flat = bench.flat_renders(case)
    found["renders with less contrast, after a loop"] = spread(bench.looped(case, subject, flat, 1)[-1])
    found["renders with less contrast, after a loop"] /= spread(bench.round_trips(real, 1))
    return found


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    from ..core.measures import paired_interval
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
    more = paired_interval([row["published"] - row["exact"] for row in rows])
    gates = {
        "exact level loses little": mean["exact"] <= LOSS_GATE,
        "the published level loses more": more.low > 0 and mean["published"] >= FACTOR_GATE * mean["exact"],
    }
    result = {"mean": mean, "published - exact": vars(more), "gates": gates}
    say(json.dumps(result, indent=1))
    settings = {"loops": LOOPS, "steps": STEPS, "ratio": RATIO, "cfg": CFG, "samples": SAMPLES}
    write(options.out, {"settings": settings, **result, "rows": rows})
    return int(not all(gates.values()))
