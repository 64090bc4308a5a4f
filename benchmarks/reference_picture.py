"""HiFi Tuner's reference image: is a subject laid on itself, and is the right image chosen? On toyworld, counted.

Alignment: subject masks of toyworld (96 px) and the same through a random similarity (scale 0.6 to 1.6, up to 60
degrees, inside the frame, at least 64 pixels); how well does the found transform cover the target, in the symmetric
form and in the printed one? Choice: four images and a fifth; how often is the one taken that shows the same individual
of a class, the same place, or the same view?

    python toolbox/_load.py benchmarks.reference_picture --out benchmarks/results/reference_picture.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.reference.alignment import align, matrices, warp
from ..toyworld import world
from ..toyworld.painting import Pose
from ..toyworld.vision_models import FOLDERS, build_vision_folders
from . import frame

CANDIDATES, SMALLEST, ENOUGH, SHARE, CHOICE_GATE = 4, 64, 0.9, 0.95, 0.90
ENCODERS = ("measure", "clip", "dino")
Set = tuple[list[Any], Any, int]


def transforms(cases: range) -> Iterator[tuple[Any, Any, float]]:
    """(mask, the same transformed, scale): held-out subjects by turns of class, half as large as toyworld's own so that
    there is room to grow.
    """
    for index in cases:
        rng = np.random.default_rng([7, index])
        identity = world.identity(index, cls=world.CLASSES[index % len(world.CLASSES)])
        x, y, turn = (float(rng.uniform(*within)) for within in ((0.4, 0.6), (0.4, 0.6), (-0.2, 0.2)))
        outline = world.render(identity, "studio", index, pose=Pose(0.45, x, y, turn))[1]
        mask = torch.from_numpy(outline > 127).float()
        while True:
            scale, angle = float(rng.uniform(0.6, 1.6)), math.radians(float(rng.uniform(-60, 60)))
            theta = torch.tensor([[math.log(scale), angle, *rng.uniform(-0.5, 0.5, 2)]], dtype=torch.float32)
            moved = warp(mask[None, None], matrices(theta)[0], (mask.shape[0], mask.shape[1]), "zeros")[0, 0]
            target = (moved > 0.5).float()
            inside = not (target[[0, -1]].any() or target[:, [0, -1]].any())
            if inside and int(target.sum()) >= SMALLEST:
                break
        yield mask, target, scale


def aligned(cases: range) -> dict[str, Any]:
    """IoU and scale of both forms over the transforms."""
    from ..core.reference.host.alignment import MAX_DEGREES

    rows, seconds = [], []
    for mask, target, scale in transforms(cases):
        start = time.perf_counter()
        ours = align(mask, target, max_degrees=MAX_DEGREES)
        seconds.append(time.perf_counter() - start)
        printed = align(mask, target, literal=True)
        rows.append((ours.iou, printed.iou, ours.scale / scale, printed.scale / scale))
    iou, printed_iou, scale, printed_scale = (np.array(column) for column in zip(*rows, strict=True))

    def described(iou: Any, scale: Any) -> dict[str, Any]:
        return {
            "IoU at least 0.9": float((iou >= ENOUGH).mean()),
            "IoU, mean and least": [float(iou.mean()), float(iou.min())],
            "scale found / scale, mean": float(scale.mean()),
        }

    small = float((printed_scale < 0.95).mean())
    return {
        "cases": len(cases),
        "symmetric": {**described(iou, scale), "seconds, median": float(np.median(seconds))},
        "as printed": {**described(printed_iou, printed_scale), "too small by more than 5 %": small},
        "gate held": bool((iou >= ENOUGH).mean() >= SHARE),
    }


def drawn(cases: range, kind: int) -> Iterator[tuple[int, Any, Any, int, list[str]]]:
    """For each case: its index, its random numbers, the subject, which candidate is the right one, and the places."""
    for index in cases:
        rng = np.random.default_rng([kind, index])
        right, places = int(rng.integers(CANDIDATES)), rng.permutation(list(world.BACKGROUNDS)).tolist()
        yield index, rng, world.identity(1000 + index), right, places


def individuals(cases: range) -> Iterator[Set]:
    """One individual among others of its class, all in one place; the fifth image shows it in another place."""
    for index, _, wanted, right, places in drawn(cases, 9):
        others = [world.identity(5000 + 10 * index + other, wanted.cls) for other in range(CANDIDATES)]
        others[right] = wanted
        candidates = [image(each, places[0], 100 * index + n) for n, each in enumerate(others)]
        yield candidates, image(wanted, places[1], 100 * index + 50), right


def places(cases: range) -> Iterator[Set]:
    """One subject in four places; the fifth image shows it in one of them, drawn anew."""
    for index, _, wanted, right, order in drawn(cases, 10):
        candidates = [image(wanted, order[n], 100 * index + n) for n in range(CANDIDATES)]
        yield candidates, image(wanted, order[right], 100 * index + 50), right


def views(cases: range) -> Iterator[Set]:
    """One subject in one place, turned by -30 to 30 degrees; the fifth shows one of these views in another place. The
    encoders were never taught to tell views apart.
    """
    for index, rng, wanted, right, order in drawn(cases, 11):
        turns = np.linspace(-0.5, 0.5, CANDIDATES).tolist()
        candidates = [image(wanted, order[0], 100 * index + n, Pose(0.82, 0.5, 0.5, t)) for n, t in enumerate(turns)]
        near = Pose(0.82 * float(rng.uniform(0.93, 1.07)), 0.5, 0.5, turns[right] + float(rng.uniform(-0.08, 0.08)))
        yield candidates, image(wanted, order[1], 100 * index + 50, near), right


def image(identity: Any, place: str, seed: int, pose: Any = None) -> Any:
    return torch.from_numpy(world.render(identity, place, seed, pose=pose)[0].astype(np.float32) / 255)


def chosen(cases: range, folder: Path) -> dict[str, Any]:
    """Share of right choices by encoder and by what has to be told apart."""
    from ..core.reference.host.alignment import choose_reference
    from ..core.vision.host.vision import load_vision

    def share(vision: Any, make: Callable[[range], Iterator[Set]]) -> float:
        sets = ((torch.stack(candidates), fifth, right) for candidates, fifth, right in make(cases))
        return frame.mean(choose_reference(four, fifth[None], vision, None)[0] == right for four, fifth, right in sets)

    paths, kinds = build_vision_folders(folder), {"individual": individuals, "place": places, "view": views}
    result: dict[str, Any] = {"cases": len(cases), "candidates": CANDIDATES}
    for name in ENCODERS:
        vision = load_vision(paths[FOLDERS[name]])
        result[name] = {title: share(vision, make) for title, make in kinds.items()}
    best = result[ENCODERS[0]]
    return {**result, "gate held": best["individual"] >= CHOICE_GATE and best["place"] >= CHOICE_GATE}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("reference_picture", arguments, threads=1, cases=64)
    cases = range(run.options.first, run.options.first + run.options.count)
    result = {"alignment": aligned(cases), "choice": chosen(cases, run.base / "vision")}
    frame.say(json.dumps(result, indent=1))
    return run.costs(result, {name: part["gate held"] for name, part in result.items()})
