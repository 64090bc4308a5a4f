"""Does EZIGen's adapter bring the subject along, and does the picture still obey? On the small world, counted.

The adapter was trained on pairs of pictures of other subjects (toyworld/pairs.py). For each held-out subject one
picture is rendered, cut out by the judge's mask and encoded by the pack's own code; pictures of the subject in another
place are then sampled from the same noise by the prompt alone, and with the adapter in the last part of the steps,
at once and after some loops at exact noise level. Identity and text are measured as in effect_hiper. The narrow form
of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.effect_ezigen --adapter <file> --out benchmarks/results/effect_ezigen.json
    python toolbox/_load.py benchmarks.effect_ezigen --adapter <file> --ratios 0.2 0.4 0.6 0.8 1.0 --loops 0
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
RATIO, LOOPS, MARGIN = 0.4, 3, 0.06
WON_GATE, TEXT_GATE = 0.75, 0.05


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

    def latents(self, model: Any, case: effect_hiper.Case, sigmas: Any, seed: int, start: Any = None) -> Any:
        """Latents [SAMPLES, 4, 12, 12] of the target prompt, from noise or, at the first level, from clean latents."""
        import comfy.sample
        import comfy.samplers
        import torch

        shape = (SAMPLES, 4, SIDE // 8, SIDE // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        target = self.conditioning(case.prompt(case.target_place))
        with torch.inference_mode():
            sampler = comfy.samplers.sampler_object(SAMPLER)
            latent = torch.zeros(shape) if start is None else start
            return comfy.sample.sample_custom(
                model, noise, CFG, sampler, sigmas, target, self.conditioning(""), latent, disable_pbar=True, seed=seed
            )

    def sigmas(self) -> Any:
        """The levels of a sampling."""
        import comfy.samplers

        sampling = self.world.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, SCHEDULER, STEPS)

    def decoded(self, latents: Any) -> Any:
        """Pictures [N, 3, 96, 96]."""
        import torch

        with torch.inference_mode():
            return self.world.vae.decode(latents).movedim(-1, 1)


def row_of(bench: Bench, case: effect_hiper.Case, ratios: list[float], loops: int) -> dict[str, Any]:
    """One subject: the prompt alone, the adapter in each part of the steps and, for RATIO, after each loop."""
    from ..core.staged_sampling import split

    subject, sigmas = bench.subject(case), bench.sigmas()
    row: dict[str, Any] = {
        "subject": " ".join(word for word in vars(case.identity).values() if word),
        "without": bench.judged(case, bench.decoded(bench.latents(bench.world.model, case, sigmas, case.seed))),
        "real render": bench.control(case),
    }
    for ratio in ratios:
        found = bench.latents(bench.adapted(subject, ratio), case, sigmas, case.seed)
        row[f"ratio {ratio:g}"] = bench.judged(case, bench.decoded(found))
        if ratio == RATIO:
            for loop in range(loops):
                again = bench.latents(
                    bench.adapted(subject), case, split(sigmas, ratio)[1], case.seed + loop + 1, found
                )
                found = again
                row[f"loop {loop + 1}"] = bench.judged(case, bench.decoded(found))
    return row


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


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_ezigen")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--ratios", type=float, nargs="+", default=[RATIO])
    parser.add_argument("--loops", type=int, default=LOOPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench = Bench(options.adapter)
    rows = []
    for case in cases(options.subjects):
        rows.append(row_of(bench, case, options.ratios, options.loops))
        shown = {key: round(value["identity"], 3) for key, value in rows[-1].items() if key != "subject"}
        sys.stdout.write(f"{len(rows):3d} {json.dumps(shown)}  {rows[-1]['subject']}\n")
        sys.stdout.flush()
    found = summary(rows)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    settings = {"ratios": options.ratios, "loops": options.loops, "cfg": CFG, "samples": SAMPLES, "steps": STEPS}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "rows": rows, "summary": found}, indent=1) + "\n")
    return int(len(rows) > 1 and not held(found))
