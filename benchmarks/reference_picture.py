"""HiFi Tuner's reference picture: is a subject laid on itself, and is the right picture chosen? Small world, counted.

Alignment: subject masks of the small world (96 px) and the same through a random similarity (scale 0.6 to 1.6, up to 60
degrees, inside the frame, at least 64 pixels); how well does the found transform cover the target, in the symmetric
form and in the printed one? Choice: four pictures and a fifth; how often is the one taken that shows the same
individual of a class, the same place, or the same view?

    python toolbox/_load.py benchmarks.reference_picture --out benchmarks/results/reference_picture.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import hosting

CASES, CANDIDATES = 64, 4
SMALLEST, ENOUGH, SHARE = 64, 0.9, 0.95
CHOICE_GATE = 0.90
ENCODERS = ("measure", "clip", "dino")
Set = tuple[list[Any], Any, int]


def transforms(count: int) -> Iterator[tuple[Any, Any, float]]:
    """(mask, the same transformed, scale): held-out subjects by turns of class."""
    import torch

    from ..core.reference.alignment import matrices, warp
    from ..toyworld import world

    for index in range(count):
        rng = np.random.default_rng([7, index])
        identity = world.identity(index, cls=world.CLASSES[index % len(world.CLASSES)])
        mask = torch.from_numpy(world.render(identity, "studio", index, pose=_small(rng))[1] > 127).float()
        while True:
            scale, angle = float(rng.uniform(0.6, 1.6)), math.radians(float(rng.uniform(-60, 60)))
            theta = torch.tensor([[math.log(scale), angle, *rng.uniform(-0.5, 0.5, 2)]], dtype=torch.float32)
            target = (
                warp(mask[None, None], matrices(theta)[0], (mask.shape[0], mask.shape[1]), "zeros")[0, 0] > 0.5
            ).float()
            inside = not (target[[0, -1]].any() or target[:, [0, -1]].any())
            if inside and int(target.sum()) >= SMALLEST:
                break
        yield mask, target, scale


def _small(rng: np.random.Generator) -> Any:
    """A pose that leaves room to grow: half as large as the small world's own."""
    from ..toyworld.painting import Pose

    return Pose(0.45, float(rng.uniform(0.4, 0.6)), float(rng.uniform(0.4, 0.6)), float(rng.uniform(-0.2, 0.2)))


def aligned(count: int) -> dict[str, Any]:
    """IoU and scale of both forms over the transforms."""
    from ..core.reference.alignment import align
    from ..core.reference.host.alignment import MAX_DEGREES

    rows, seconds = [], []
    for mask, target, scale in transforms(count):
        start = time.perf_counter()
        ours = align(mask, target, max_degrees=MAX_DEGREES)
        seconds.append(time.perf_counter() - start)
        printed = align(mask, target, literal=True)
        rows.append((ours.iou, printed.iou, ours.scale / scale, printed.scale / scale))
    iou, printed_iou, scale, printed_scale = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "cases": count,
        "symmetric": {
            "IoU at least 0.9": float((iou >= ENOUGH).mean()),
            "IoU, mean and least": [float(iou.mean()), float(iou.min())],
            "scale found / scale, mean": float(scale.mean()),
            "seconds, median": float(np.median(seconds)),
        },
        "as printed": {
            "IoU at least 0.9": float((printed_iou >= ENOUGH).mean()),
            "IoU, mean and least": [float(printed_iou.mean()), float(printed_iou.min())],
            "scale found / scale, mean": float(printed_scale.mean()),
            "too small by more than 5 %": float((printed_scale < 0.95).mean()),
        },
        "gate held": bool((iou >= ENOUGH).mean() >= SHARE),
    }


def individuals(count: int) -> Iterator[Set]:
    """One individual among others of its class, all in one place; the fifth picture shows it in another place."""
    from ..toyworld import world

    for index in range(count):
        rng = np.random.default_rng([9, index])
        wanted = world.identity(1000 + index)
        right, places = int(rng.integers(CANDIDATES)), rng.permutation(list(world.BACKGROUNDS)).tolist()
        others = [world.identity(5000 + 10 * index + other, wanted.cls) for other in range(CANDIDATES)]
        others[right] = wanted
        candidates = [_picture(each, places[0], 100 * index + n) for n, each in enumerate(others)]
        yield candidates, _picture(wanted, places[1], 100 * index + 50), right


def places(count: int) -> Iterator[Set]:
    """One subject in four places; the fifth picture shows it in one of them, drawn anew."""
    from ..toyworld import world

    for index in range(count):
        rng = np.random.default_rng([10, index])
        wanted = world.identity(1000 + index)
        right, order = int(rng.integers(CANDIDATES)), rng.permutation(list(world.BACKGROUNDS)).tolist()
        candidates = [_picture(wanted, order[n], 100 * index + n) for n in range(CANDIDATES)]
        yield candidates, _picture(wanted, order[right], 100 * index + 50), right


def views(count: int) -> Iterator[Set]:
    """One subject in one place, turned by -30 to 30 degrees; the fifth shows one of these views in another place. The
    encoders were never taught to tell views apart.
    """
    from ..toyworld import world
    from ..toyworld.painting import Pose

    for index in range(count):
        rng = np.random.default_rng([11, index])
        wanted = world.identity(1000 + index)
        right, order = int(rng.integers(CANDIDATES)), rng.permutation(list(world.BACKGROUNDS)).tolist()
        turns = np.linspace(-0.5, 0.5, CANDIDATES).tolist()
        candidates = [_picture(wanted, order[0], 100 * index + n, Pose(0.82, 0.5, 0.5, t)) for n, t in enumerate(turns)]
        near = Pose(0.82 * float(rng.uniform(0.93, 1.07)), 0.5, 0.5, turns[right] + float(rng.uniform(-0.08, 0.08)))
        yield candidates, _picture(wanted, order[1], 100 * index + 50, near), right


def _picture(identity: Any, place: str, seed: int, pose: Any = None) -> Any:
    import torch

    from ..toyworld import world

    return torch.from_numpy(world.render(identity, place, seed, pose=pose)[0].astype(np.float32) / 255)


def chosen(count: int, folder: Path) -> dict[str, Any]:
    """Share of right choices by encoder and by what had to be told apart."""
    import torch

    from ..core.reference.host.alignment import choose_reference
    from ..core.vision.host.vision import load_vision
    from ..toyworld.vision_models import FOLDERS, build_vision_folders

    paths = build_vision_folders(folder)
    result: dict[str, Any] = {"cases": count, "candidates": CANDIDATES}
    for name in ENCODERS:
        vision = load_vision(paths[FOLDERS[name]])
        result[name] = {
            title: float(
                np.mean(
                    [
                        choose_reference(torch.stack(candidates), picture[None], vision, None).index == right
                        for candidates, picture, right in make(count)
                    ]
                )
            )
            for title, make in (("individual", individuals), ("place", places), ("view", views))
        }
    best = result[ENCODERS[0]]
    result["gate held"] = best["individual"] >= CHOICE_GATE and best["place"] >= CHOICE_GATE
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    base = hosting.start(given.threads)
    import torch

    result: dict[str, Any] = {
        "alignment": aligned(given.cases),
        "choice": chosen(given.cases, base / "vision"),
        "torch": torch.__version__,
        "threads": given.threads,
    }
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
    return int(not all(part["gate held"] for part in (result["alignment"], result["choice"])))
