"""Stage "teacher": what a generator makes of training captions, as (noise, prompt, latent) for a student to learn from.

The pairs lie in parts of 64 in the folder teacher_<world>; a run that was stopped goes on with the first missing part.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from . import comfyui, dataset, training, worlds
from .training import WORK, log

PART, STEPS, FIRST_SEED = 64, 20, 50_000_000


def captions_of(count: int) -> list[str]:
    """The captions of the first pairs: those of the training scenes, turn after turn."""
    known = dataset.load("train")["captions"]
    return [known[i % len(known)] for i in range(count)]


def load_teacher(name: str) -> worlds.World:
    """A world's own generator: the one in training in the work folder where there is one, else the committed one."""
    from .export import flow_tensors

    trained = name == "flow" and (WORK / "flow.pt").exists()
    return worlds.load_flow_world(tensors=flow_tensors()) if trained else worlds.LOADERS[name]()


def load(world: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, seeds of their noise) of the first `count` pairs; their prompts are `captions_of(count)`."""
    parts = [WORK / f"teacher_{world}" / f"{start // PART:05d}.pt" for start in range(0, count, PART)]
    missing = [path for path in parts if not path.exists()]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(parts)} parts of the pairs are missing: run the stage `teacher`.")
    latents = torch.cat([torch.load(path, weights_only=True) for path in parts])[:count].float()
    return latents, torch.arange(FIRST_SEED, FIRST_SEED + count)


def main(arguments: list[str]) -> None:
    """Sample part after part."""
    parser = argparse.ArgumentParser(prog="run.py teacher")
    parser.add_argument("world", choices=tuple(worlds.LOADERS))
    parser.add_argument("--pairs", type=int, default=1_792)
    options = parser.parse_args(arguments)
    training.start()
    comfyui.prepare()
    world = load_teacher(options.world)
    folder, captions, began = WORK / f"teacher_{options.world}", captions_of(options.pairs), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        empty = world.given(world.rows([""]))
        for start in range(0, options.pairs, PART):
            path = folder / f"{start // PART:05d}.pt"
            if path.exists():
                continue
            given = world.given(world.rows(captions[start : start + PART]))
            noise = world.noise_of(range(FIRST_SEED + start, FIRST_SEED + start + len(given[0])))
            made = worlds.sample(world, world.network, noise, given, STEPS, world.guidance, empty)
            torch.save(made.half(), path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            if start // PART % 8 == 0:
                log(start + len(made), "pairs", f"{time.time() - began:.0f} s")
