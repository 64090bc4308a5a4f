"""Stage "pairs": pairs of pictures of one subject for training a subject adapter: alone on white, and in a scene.

The two are rendered in poses of their own, so that copying the picture does not do. The caption of the scene often
leaves out what only the picture can tell. Subjects whose hash is 0 modulo ten are kept for checking only, as are the
held-out combinations.
"""

from __future__ import annotations

import argparse
import os
from multiprocessing import get_context

import numpy as np
import torch

from . import world
from .judge import subject_crop
from .subjects import for_checking
from .training import WORK, log

PAIRS = 8_192
FILE = "pairs.pt"
WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.3, ("background",)),
    (0.35, ("color", "background")),
    (0.45, ()),
    (0.6, world.MAIN_WORDS),
)
"""What a caption mentions, by cumulative share; the rest as in the generator's own training."""


def caption_words(rng: np.random.Generator) -> tuple[str, ...]:
    """Which attributes a caption mentions, next to the class."""
    kind = rng.random()
    return next((words for limit, words in WORDS if kind < limit), None) or world.training_words(rng)


def subject_prompt(class_name: str) -> str:
    """What a subject's own picture is encoded with."""
    return f"a photo of a {class_name}"


def pair(seed: int) -> tuple[world.Scene, np.ndarray, np.ndarray]:
    """The captioned scene of `seed`, and another picture of its subject with the mask."""
    rng = np.random.default_rng([9, seed])
    while True:
        idn = world.identity(int(rng.integers(2**31)))
        place, other = (str(rng.choice(list(world.BACKGROUNDS))) for _ in range(2))
        known = not any(world.held_out(idn.cls, idn.color, idn.texture, each) for each in (place, other))
        if known and not for_checking(idn):
            break
    image, mask = world.render(idn, place, int(rng.integers(2**31)))
    scene = world.Scene(image, mask, world.caption(idn, place, caption_words(rng)), idn, place)
    return scene, *world.render(idn, other, int(rng.integers(2**31)))


def _render(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, str]:
    scene, picture, mask = pair(seed)
    return scene.image, picture, mask, scene.caption, scene.identity.cls


@torch.no_grad()
def encoded(vae: object, pictures: np.ndarray, masks: np.ndarray | None, seed: int) -> torch.Tensor:
    """Normalised latents [N,4,12,12] fp16 of uint8 pictures [N,96,96,3]; with masks, of the subjects alone on white."""
    from .widen import SD15_LATENT_SCALE

    images = torch.from_numpy(pictures).movedim(-1, 1).float() / 255
    if masks is not None:
        margin = float(np.random.default_rng([10, seed]).uniform(0.02, 0.12))
        images = subject_crop(images, torch.from_numpy(masks).float() / 255, world.SIZE, margin)
    return (vae.encode(images.movedim(1, -1)) * SD15_LATENT_SCALE).half()


def main(arguments: list[str]) -> None:
    """Render and encode; writes pairs.pt."""
    from .comfyui import prepare
    from .narrow import load_narrow
    from .networks import token_ids

    parser = argparse.ArgumentParser(prog="run.py pairs")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    count = parser.parse_args(arguments).pairs
    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare()
    narrow = load_narrow()
    scenes, subjects, captions, classes = [], [], [], []
    with get_context("fork").Pool(1) as pool:
        jobs = pool.imap(_render, range(count), chunksize=32)
        for start in range(0, count, 64):
            rows = [next(jobs) for _ in range(min(64, count - start))]
            images, pictures, masks, texts, names = zip(*rows, strict=True)
            scenes.append(encoded(narrow.vae, np.stack(images), None, start))
            subjects.append(encoded(narrow.vae, np.stack(pictures), np.stack(masks), start))
            captions += texts
            classes += [world.CLASSES.index(name) for name in names]
            if start % 2048 == 0:
                log("pairs", start + len(rows))
    ids = token_ids(narrow.tokenizer, captions)
    found = {
        "scenes": torch.cat(scenes),
        "subjects": torch.cat(subjects),
        "rows": narrow.text.rows_of(ids).to(torch.uint8),
        "classes": torch.tensor(classes),
    }
    torch.save(found, WORK / f"{FILE}.part")
    os.replace(WORK / f"{FILE}.part", WORK / FILE)
    log("pairs", len(found["scenes"]))
