"""Does EZIGen's adapter bring the subject along, and does the picture still obey? On the small world, counted.

The adapter was trained on pairs of pictures of other subjects (toyworld/pairs.py). For each held-out subject one
picture is rendered, cut out by the judge's mask and encoded by the pack's own code; pictures of the subject in another
place are then sampled from the same noise by the prompt alone, and with the adapter in the last part of the steps,
at once and after some loops at exact noise level; the curve over that part shows what it trades. Identity and text are
measured as in effect_hiper. The narrow form of the small world is used: the same function as the checkpoint, at a
fraction of the cost.

    python toolbox/_load.py benchmarks.effect_ezigen --out benchmarks/results/effect_ezigen.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting
from .effect_sine import spearman, write

SAMPLES, STEPS, CFG, SIDE = 4, 20, 4.0, 96
SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"
RATIO, RATIOS, LOOPS, MARGIN = 0.4, (0.2, 0.4, 0.6, 0.8, 1.0), 3, 0.06
WON_GATE, TEXT_GATE, CURVE_GATE = 0.75, 0.05, 0.9


def cases(count: int) -> list[effect_hiper.Case]:
    """The first `count` held-out subjects; only such that no training has seen in any place."""
    from ..toyworld import world
    from ..toyworld.subjects import for_checking

    found = []
    for index, case in enumerate(effect_hiper.cases(2 * count)):
        key, first = case.identity, 830_000 + 1000 * index
        drawn = (world.identity(first + number, key.cls, key.color, key.texture) for number in range(1000))
        identity = next(filter(for_checking, drawn), None)  # a plain subject may have no variant that was kept
        if identity is not None:
            found.append(replace(case, identity=identity))
    return found[:count]


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own encoding, adapter and sampling on them."""

    def __init__(self, adapter: Path) -> None:
        from ..core.ezigen.artifact import read_adapter

        super().__init__()
        self.adapter = read_adapter(adapter)

    def subject(self, case: effect_hiper.Case) -> Any:
        """The subject's one picture, cut out and encoded."""
        import torch

        from ..core.ezigen.host.adapter import encode_subject, prepared
        from ..toyworld.pairs import subject_prompt

        with torch.inference_mode():
            picture = self.picture(case)
            ready = prepared(picture, self.judge.mask(picture.movedim(-1, 1)), SIDE, MARGIN)
            prompt = self.conditioning(subject_prompt(case.identity.cls))
            return encode_subject(self.world.model, self.world.vae, prompt, ready, case.seed)

    def adapted(self, subject: Any, ratio: float = 1.0, **more: Any) -> Any:
        """The MODEL with the adapter in this part of the steps."""
        import torch

        from ..core.ezigen.host.adapter import with_adapter

        with torch.inference_mode():
            return with_adapter(self.world.model, self.adapter, subject, ratio, **more)

    def pictures(
        self, case: effect_hiper.Case, subject: Any, settings: Any, start: Any = None, model: Any = None
    ) -> Any:
        """Pictures [N, 3, 96, 96] of the first sampling, or of `start`, and of each loop, by the pack's own stages."""
        import torch

        from ..core.ezigen.host.staged import Prompts, staged

        negative = self.conditioning("")
        prompts = Prompts(self.conditioning(case.prompt(case.target_place)), negative, negative)
        size = torch.zeros(SAMPLES, 4, SIDE // 8, SIDE // 8)
        start = None if start is None else start.movedim(1, -1)
        with torch.inference_mode():
            found = staged(
                model or self.world.model, self.world.vae, self.adapter, subject, prompts, size, settings, start=start
            )
        return found.pictures.movedim(-1, 1).split(SAMPLES)

    def sampled(self, model: Any, case: effect_hiper.Case) -> Any:
        """Pictures [N, 3, 96, 96] of the target prompt from the same noise, in a stock sampling."""
        import comfy.sample
        import comfy.samplers
        import torch

        from ..core.ezigen.host.staged import stock_noise

        shape = (SAMPLES, 4, SIDE // 8, SIDE // 8)
        noise = stock_noise(torch.zeros(shape), case.seed)
        target = self.conditioning(case.prompt(case.target_place))
        with torch.inference_mode():
            levels = comfy.samplers.calculate_sigmas(
                self.world.model.get_model_object("model_sampling"), SCHEDULER, STEPS
            )
            latents = comfy.sample.sample_custom(
                model, noise, CFG, comfy.samplers.sampler_object(SAMPLER), levels, target, self.conditioning(""),
                torch.zeros(shape), disable_pbar=True, seed=case.seed,
            )  # fmt: skip
            return self.world.vae.decode(latents).movedim(-1, 1)

    def round_trips(self, pictures: Any, count: int) -> Any:
        """Pictures after so many ways through the autoencoder."""
        import torch

        with torch.inference_mode():
            for _ in range(count):
                pictures = self.world.vae.decode(self.world.vae.encode(pictures.movedim(1, -1))).movedim(-1, 1)
        return pictures


def row_of(bench: Bench, case: effect_hiper.Case, ratios: list[float], loops: int) -> dict[str, Any]:
    """One subject: the prompt alone, the adapter in each part of the steps and, for RATIO, after each loop."""
    from ..core.ezigen.host.staged import StagedSettings
    from ..core.ezigen.staged import Loops

    subject = bench.subject(case)
    row: dict[str, Any] = {
        "subject": " ".join(word for word in vars(case.identity).values() if word),
        "without": bench.judged(case, bench.sampled(bench.world.model, case)),
        "real render": bench.control(case),
    }
    for ratio in ratios:
        if ratio == RATIO:
            settings = StagedSettings(case.seed, STEPS, CFG, ratio, Loops(loops, loops), SAMPLER, SCHEDULER)
            first, *others = bench.pictures(case, subject, settings)
            row[f"ratio {ratio:g}"] = bench.judged(case, first)
            row |= {f"loop {number + 1}": bench.judged(case, each) for number, each in enumerate(others)}
        else:
            row[f"ratio {ratio:g}"] = bench.judged(case, bench.sampled(bench.adapted(subject, ratio), case))
    return row


def summary(rows: list[dict]) -> dict[str, Any]:
    """Means of all, and of every way with the adapter the paired gain over the prompt alone."""
    from ..core.vision.measures import paired_interval

    found: dict[str, Any] = {"subjects": len(rows)}
    for kind in (key for key in rows[0] if key != "subject"):
        identity, text = (sum(row[kind][score] for row in rows) / len(rows) for score in ("identity", "text"))
        found[kind] = {"identity": identity, "text": text}
        if kind != "without":
            gains = [row[kind]["identity"] - row["without"]["identity"] for row in rows]
            found[kind]["gain"] = vars(paired_interval(gains))
            found[kind]["text lost"] = 1 - text / found["without"]["text"]
    return found


def curve(found: dict[str, Any]) -> dict[str, float]:
    """Rank correlation of the ratio, 0 for the prompt alone, with the mean identity and text."""
    ratios = {0.0: "without", **{float(key.split()[1]): key for key in found if key.startswith("ratio")}}
    rise = {score: [found[key][score] for key in ratios.values()] for score in ("identity", "text")}
    return {score: spearman(list(ratios), values) for score, values in rise.items()}


def gates(found: dict[str, Any]) -> dict[str, bool]:
    """What is asked of the last loop, else of RATIO, and of the curve where it was measured."""
    last = [value for key, value in found.items() if key.startswith("loop") or key == f"ratio {RATIO:g}"][-1]
    held = {
        "identity rises": last["gain"]["low"] > 0,
        "share won": last["gain"]["share_won"] >= WON_GATE,
        "text stays": last["text lost"] <= TEXT_GATE,
    }
    if "spearman" in found:
        held["identity rises with the ratio"] = found["spearman"]["identity"] >= CURVE_GATE
        held["text falls with the ratio"] = found["spearman"]["text"] <= -CURVE_GATE
    return held


def say(line: str) -> None:
    """To the console, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    from ..toyworld.assets import ASSETS

    parser = argparse.ArgumentParser(prog="benchmarks.effect_ezigen")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "adapter.safetensors", help="in the narrow form")
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--loops", type=int, default=LOOPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench, rows = Bench(options.adapter), []
    for case in cases(options.subjects):
        rows.append(row_of(bench, case, options.ratios, options.loops))
        shown = {key: round(value["identity"], 3) for key, value in rows[-1].items() if key != "subject"}
        say(f"{len(rows):3d} {json.dumps(shown)}  {rows[-1]['subject']}")
    found = summary(rows)
    if len(options.ratios) > 2:
        found["spearman"] = curve(found)
    found["gates"] = gates(found)
    say(json.dumps(found, indent=1))
    settings = {"ratios": list(options.ratios), "loops": options.loops, "cfg": CFG, "samples": SAMPLES, "steps": STEPS}
    write(options.out, {"settings": settings, "rows": rows, "summary": found})
    return int(not all(found["gates"].values()))
