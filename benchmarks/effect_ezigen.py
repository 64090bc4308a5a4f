"""Does EZIGen's adapter bring the subject along, and does the picture still obey? On the small world, counted.

The adapter was trained on pairs of pictures of other subjects (toyworld/pairs.py). For each held-out subject one
picture is rendered, cut out by the judge's mask and encoded by the pack's own code; pictures of the subject in another
place are then sampled from the same noise by the prompt alone, and with the adapter in the last part of the steps,
at once and after some loops at exact noise level. Identity and text are measured as in effect_hiper. The narrow form
of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.effect_ezigen --adapter <file> --out benchmarks/results/effect_ezigen.json
    python toolbox/_load.py benchmarks.effect_ezigen --adapter <file> --ratios 0.2 0.4 0.6 0.8 1.0 --loops 0
    python toolbox/_load.py benchmarks.effect_ezigen --adapter <file> --contrast
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting

SAMPLES, STEPS, CFG, SIDE = 4, 20, 4.0, 96
SAMPLER, SCHEDULER = "ddpm", "ddim_uniform"
RATIO, LOOPS, MARGIN, CONTRAST_LOOPS = 0.4, 3, 0.06, 9
WON_GATE, TEXT_GATE, CONTRAST_GATE, CONTRAST_FACTOR = 0.75, 0.05, 0.03, 3.0


def cases(count: int) -> list[effect_hiper.Case]:
    """The first `count` held-out subjects; only such that no training has seen in any place."""
    from ..toyworld import world
    from ..toyworld.subjects import for_checking

    found = []
    for index, case in enumerate(effect_hiper.cases(count)):
        key, number = case.identity, 830_000 + 1000 * index
        while not for_checking(identity := world.identity(number, key.cls, key.color, key.texture)):
            number += 1
        found.append(replace(case, identity=identity))
    return found


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own encoding, adapter and sampling on them."""

    def __init__(self, adapter: Path) -> None:
        from ..core.adapter_file import read_adapter

        super().__init__()
        self.adapter = read_adapter(adapter)

    def subject(self, case: effect_hiper.Case) -> Any:
        """The subject's one picture, cut out and encoded."""
        import torch

        from ..core.host.adapter import encode_subject, prepared
        from ..toyworld.pairs import subject_prompt

        with torch.inference_mode():
            picture = self.picture(case)
            ready = prepared(picture, self.judge.mask(picture.movedim(-1, 1)), SIDE, MARGIN)
            prompt = self.conditioning(subject_prompt(case.identity.cls))
            return encode_subject(self.world.model, self.world.vae, prompt, ready, case.seed)

    def adapted(self, subject: Any, ratio: float = 1.0, **more: Any) -> Any:
        """The MODEL with the adapter in this part of the steps."""
        import torch

        from ..core.host.adapter import with_adapter

        with torch.inference_mode():
            return with_adapter(self.world.model, self.adapter, subject, ratio, **more)

    def pictures(self, case: effect_hiper.Case, subject: Any, ratio: float, loops: int, published: bool = False) -> Any:
        """Pictures [N, 3, 96, 96] of the first sampling and of each loop, by the pack's own stages."""
        import torch

        from ..core.host.staged_sampling import Prompts, StagedSettings, staged
        from ..core.staged_sampling import Loops

        negative = self.conditioning("")
        prompts = Prompts(self.conditioning(case.prompt(case.target_place)), negative, negative)
        settings = StagedSettings(
            case.seed, STEPS, CFG, ratio, Loops(loops, loops), SAMPLER, SCHEDULER, published_level=published
        )
        latent = torch.zeros(SAMPLES, 4, SIDE // 8, SIDE // 8)
        with torch.inference_mode():
            found = staged(self.world.model, self.world.vae, self.adapter, subject, prompts, latent, settings)
        return found.pictures.movedim(-1, 1).split(SAMPLES)

    def sampled(self, model: Any, case: effect_hiper.Case) -> Any:
        """Pictures [N, 3, 96, 96] of the target prompt from the same noise, in a stock sampling."""
        import comfy.sample
        import comfy.samplers
        import torch

        from ..core.host.staged_sampling import stock_noise

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
    subject = bench.subject(case)
    row: dict[str, Any] = {
        "subject": " ".join(word for word in vars(case.identity).values() if word),
        "without": bench.judged(case, bench.sampled(bench.world.model, case)),
        "real render": bench.control(case),
    }
    for ratio in ratios:
        if ratio == RATIO:
            first, *others = bench.pictures(case, subject, ratio, loops)
            row[f"ratio {ratio:g}"] = bench.judged(case, first)
            row |= {f"loop {number + 1}": bench.judged(case, each) for number, each in enumerate(others)}
        else:
            row[f"ratio {ratio:g}"] = bench.judged(case, bench.sampled(bench.adapted(subject, ratio), case))
    return row


def contrast_of(bench: Bench, case: effect_hiper.Case) -> dict[str, float]:
    """The share of RGB std lost over nine loops beyond nine ways through the autoencoder, at both noise levels."""
    subject, found = bench.subject(case), {}
    for name, published in (("exact", False), ("published", True)):
        first, *_, last = bench.pictures(case, subject, RATIO, CONTRAST_LOOPS, published)
        bare = bench.round_trips(first, CONTRAST_LOOPS)
        start, alone, looped = (float(each.flatten(1).std(1).mean()) for each in (first, bare, last))
        found[name] = (alone - looped) / start
        found[f"{name}, bare"] = 1 - alone / start
    return found


def summary(rows: list[dict]) -> dict[str, Any]:
    """Means of all, and of every way with the adapter the paired gain over the prompt alone."""
    from ..core.measures import paired_interval

    found: dict[str, Any] = {"subjects": len(rows)}
    for kind in (key for key in rows[0] if key != "subject"):
        identity, text = (sum(row[kind][score] for row in rows) / len(rows) for score in ("identity", "text"))
        found[kind] = {"identity": identity, "text": text}
        if kind != "without":
            gains = [row[kind]["identity"] - row["without"]["identity"] for row in rows]
            found[kind]["gain"] = vars(paired_interval(gains)) if len(rows) > 1 else gains
            found[kind]["text lost"] = 1 - text / found["without"]["text"]
    return found


def held(found: dict[str, Any]) -> bool:
    """Whether the last way of those measured (the most loops, else the last ratio) holds the gates."""
    last = [value for key, value in found.items() if key.startswith(("ratio", "loop"))][-1]
    gain = last["gain"]
    return bool(gain["low"] > 0 and gain["share_won"] >= WON_GATE and last["text lost"] <= TEXT_GATE)


def contrast(bench: Bench, options: argparse.Namespace) -> int:
    """What nine loops take of the contrast, means over the subjects."""
    rows = []
    for case in cases(options.subjects):
        rows.append(contrast_of(bench, case))
        say(f"{len(rows):3d} {json.dumps({key: round(value, 4) for key, value in rows[-1].items()})}")
    found = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    say(json.dumps(found, indent=1))
    write(options.out, {"loops": CONTRAST_LOOPS, "rows": rows, "mean": found})
    return int(found["exact"] > CONTRAST_GATE or found["published"] < CONTRAST_FACTOR * found["exact"])


def say(line: str) -> None:
    """To the console, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write(path: Path | None, found: dict[str, Any]) -> None:
    """As JSON, where a path is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_ezigen")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--ratios", type=float, nargs="+", default=[RATIO])
    parser.add_argument("--loops", type=int, default=LOOPS)
    parser.add_argument("--contrast", action="store_true", help="measure what nine loops take of the contrast instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench = Bench(options.adapter)
    if options.contrast:
        return contrast(bench, options)
    rows = []
    for case in cases(options.subjects):
        rows.append(row_of(bench, case, options.ratios, options.loops))
        shown = {key: round(value["identity"], 3) for key, value in rows[-1].items() if key != "subject"}
        say(f"{len(rows):3d} {json.dumps(shown)}  {rows[-1]['subject']}")
    found = summary(rows)
    say(json.dumps(found, indent=1))
    settings = {"ratios": options.ratios, "loops": options.loops, "cfg": CFG, "samples": SAMPLES, "steps": STEPS}
    write(options.out, {"settings": settings, "rows": rows, "summary": found})
    return int(len(rows) > 1 and not held(found))
