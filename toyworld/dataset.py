"""Renders the training and held-out scenes once and keeps them in the work folder."""

from __future__ import annotations

import argparse
import json
from multiprocessing import get_context

import numpy as np

from . import world
from .training import WORK, log

TRAINING_SCENES, HELD_OUT_SCENES = 24_576, 1_024


def labels(cls: str, color: str, texture: str, background: str) -> tuple[int, int, int, int]:
    """Attribute names as the judge's class numbers."""
    return (
        world.CLASSES.index(cls),
        list(world.COLORS).index(color),
        world.TEXTURES.index(texture),
        list(world.BACKGROUNDS).index(background),
    )


def extra_labels(idn: world.Identity) -> tuple[int, int, int, int, int]:
    """Class numbers of pattern colour, angle, emblem shape, emblem colour (0 means none) and tone."""

    def index(value: str, options: tuple[str, ...]) -> int:
        return options.index(value) + 1 if value else 0

    return (
        index(idn.pattern_color, world.PATTERN_COLORS),
        index(idn.angle, world.ANGLES),
        index(idn.emblem_shape, world.EMBLEM_SHAPES),
        index(idn.emblem_color, world.EMBLEM_COLORS),
        world.TONES.index(idn.tone),
    )


def _render(job: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray, str, tuple[int, ...]]:
    made = world.scene(*job)
    idn = made.identity
    return (
        made.image,
        made.mask,
        made.caption,
        labels(idn.cls, idn.color, idn.texture, made.background) + extra_labels(idn),
    )


def render_scenes(count: int, from_held_out: bool, processes: int = 2) -> dict[str, np.ndarray | list[str]]:
    """`count` scenes as arrays: images uint8 [N,96,96,3], masks uint8 [N,96,96], labels int64 [N,9], captions."""
    with get_context("fork").Pool(processes) as pool:
        rows = pool.map(_render, [(seed, from_held_out) for seed in range(count)], chunksize=64)
    return {
        "images": np.stack([row[0] for row in rows]),
        "masks": np.stack([row[1] for row in rows]),
        "captions": [row[2] for row in rows],
        "labels": np.array([row[3] for row in rows]),
    }


def load(name: str) -> dict[str, np.ndarray | list[str]]:
    """The rendered scenes "train" or "held_out" (large arrays are memory-mapped)."""
    folder = WORK / name
    if not (folder / "captions.json").exists():
        raise RuntimeError(f"The scenes {name} are not rendered yet: run `python toyworld/run.py data` first.")
    arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in ("images", "masks", "labels")}
    return {**arrays, "captions": json.loads((folder / "captions.json").read_text())}


def main(arguments: list[str]) -> None:
    """Render and store both sets."""
    parser = argparse.ArgumentParser(prog="run.py data")
    parser.add_argument("--scenes", type=int, default=TRAINING_SCENES)
    count = parser.parse_args(arguments).scenes
    for name, number, from_held_out in (("held_out", HELD_OUT_SCENES, True), ("train", count, False)):
        scenes = render_scenes(number, from_held_out)
        folder = WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("images", "masks", "labels"):
            np.save(folder / f"{key}.npy", scenes[key])
        (folder / "captions.json").write_text(json.dumps(scenes["captions"]))
        log(name, number, "scenes")
