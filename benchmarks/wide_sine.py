"""Does SINE's position map keep a patch-tuned model from drawing its subject twice at twice the width?

For each held-out subject of the small world a copy of the model is fine-tuned on patches of one 96 x 96 px picture, by
the pack's own code, and pictures of 192 x 96 px are sampled from the same noise with the position map and, from the
very same weights, without it: by the tuned model alone under its training prompt, and under its guidance with the edit
prompt of effect_sine.py. The judge marks the subject; what counts is the number of connected components, each above
4 % of the picture. More than one is a duplicate.

    python toolbox/_load.py benchmarks.wide_sine --out benchmarks/results/wide_sine.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import hosting
from .effect_sine import CFG, SAMPLING_STEPS, SIDE, Bench, Edit, K, Training, V, edits, stored, write

SAMPLES, WIDTH, SMALLEST = 6, 192, 0.04
PATCHES = Training("full weights", 1000, 1e-3, patches=True, whole_image=0.5)


def components(mask: Any) -> int:
    """Connected parts of a mask [H, W] of 0..1, each above SMALLEST of the picture."""
    from scipy import ndimage

    parts, count = ndimage.label((mask > 0.5).numpy())
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
    return int((sizes > SMALLEST * parts.size).sum()) if count else 0


def counted(bench: Bench, pictures: Any) -> dict[str, float]:
    """Mean number of subjects, and of those beyond the first; the share of pictures with exactly one."""
    import torch

    with torch.inference_mode():
        found = [components(mask) for mask in bench.judge.mask(pictures)]
    return {
        "subjects": sum(found) / len(found),
        "duplicates": sum(max(0, count - 1) for count in found) / len(found),
        "exactly one": sum(count == 1 for count in found) / len(found),
    }


def row_of(bench: Bench, edit: Edit, training: Training) -> dict[str, Any]:
    """One subject, with and without the map; the base alone and two constructed pictures as references."""
    import torch

    from ..core.sine.host.position_map import without_position_map

    def drawn(model: Any, prompt: str) -> dict[str, float]:
        return counted(bench, bench.pictures(model, edit, prompt, width=WIDTH, count=SAMPLES))

    tuned = bench.tune(edit, training)
    bare = without_position_map(tuned)
    source = bench.picture(edit.case).movedim(-1, 1)
    stretched = torch.nn.functional.interpolate(source, (SIDE, WIDTH), mode="bicubic").clamp(0, 1)
    square = bench.pictures(tuned, edit, edit.training_prompt)
    return {
        "tuned, map": drawn(tuned, edit.training_prompt),
        "tuned, no map": drawn(bare, edit.training_prompt),
        "guided, map": drawn(bench.guided(edit, tuned, V, K), edit.prompt),
        "guided, no map": drawn(bench.guided(edit, bare, V, K), edit.prompt),
        "base": drawn(bench.world.model, edit.prompt),
        "source stretched": counted(bench, stretched),
        "source twice": counted(bench, torch.cat([source, source], 3)),
        "tuned, map, 96 px": bench.scored(edit, square),
    }


def summary(rows: list[dict]) -> dict[str, Any]:
    """Means, and paired intervals of the map's difference."""
    from ..core.vision.measures import paired_interval

    kinds = [name for name in rows[0] if name != "subject"]
    mean = {kind: {s: sum(row[kind][s] for row in rows) / len(rows) for s in rows[0][kind]} for kind in kinds}
    less = {
        way: vars(
            paired_interval([row[f"{way}, map"]["duplicates"] - row[f"{way}, no map"]["duplicates"] for row in rows])
        )
        for way in ("tuned", "guided")
    }
    held = less["tuned"]["high"] < 0
    return {"subjects": len(rows), "mean": mean, "duplicates with minus without map": less, "gates held": held}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.wide_sine")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--steps", type=int, default=PATCHES.steps)
    parser.add_argument("--learning-rate", type=float, default=PATCHES.learning_rate)
    parser.add_argument("--whole-image", type=float, default=PATCHES.whole_image)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each subject's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    training = Training(PATCHES.method, options.steps, options.learning_rate, True, options.whole_image)
    bench = Bench()
    rows = stored(edits(options.subjects), options.rows, lambda edit: row_of(bench, edit, training))
    found = summary(rows)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    settings = {"cfg": CFG, "samples": SAMPLES, "sampling_steps": SAMPLING_STEPS, "v": V, "K": K, "width": WIDTH}
    write(options.out, {"settings": {**vars(training), **settings}, "summary": found, "rows": rows})
    return int(not found["gates held"])
