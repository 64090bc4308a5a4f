"""Stage "crops": crops of subjects in groups of hard negatives, for training and checking the identity encoders.

A group holds one identity and others of the same class and colour that differ from it in one thing each: in the
pattern, the emblem or the tone, or, among the harder subjects (`fine.py`), in one fine part. Every identity is seen in
several scenes. Identities whose hash is 0 modulo ten are kept for checking only.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F

from . import autoencoder, fine, world
from .dataset import extra_labels
from .judge import subject_crop
from .latents import load_autoencoder
from .training import WORK, log

VIEWS = 3
TRAINING_GROUPS, CHECKING_GROUPS = 2000, 250


@dataclass(frozen=True)
class Kind:
    """A kind of subjects: how its identities and their hard negatives are drawn, and what labels they have."""

    prefix: str
    changes: tuple[str, ...]
    identity: Callable[[int], world.Identity]
    variant: Callable[[world.Identity, str, int], world.Identity]
    labels: Callable[[world.Identity], tuple[int, ...]]


def plain_labels(idn: world.Identity) -> tuple[int, ...]:
    """Class numbers of class, colour, texture, pattern colour, angle, emblem shape, emblem colour and tone."""
    main = world.CLASSES.index(idn.cls), list(world.COLORS).index(idn.color), world.TEXTURES.index(idn.texture)
    return (*main, *extra_labels(idn))


def fine_labels(idn: world.Identity) -> tuple[int, ...]:
    """The same, and those of the fine parts."""
    return (*plain_labels(idn), *fine.labels(idn))


KINDS = {
    "plain": Kind("crops", ("pattern", "emblem", "tone"), world.identity, world.variant, plain_labels),
    "fine": Kind("crops_fine", fine.CHANGES, fine.identity, fine.variant, fine_labels),
}
PLAIN = KINDS["plain"]


def for_checking(idn: world.Identity) -> bool:
    """True for the identities that encoder training never sees."""
    return zlib.crc32(idn.family().encode()) % 10 == 0


def group(seed: int, checking: bool, kind: Kind = PLAIN) -> list[world.Identity]:
    """One identity and its hard negatives, all from the training or all from the checking identities."""
    number = seed * 10_000 + (5_000_000_000 if checking else 0)
    while for_checking(base := kind.identity(number)) != checking:
        number += 1
    members = [base]
    for change in kind.changes:
        attempt = number
        while True:
            attempt += 1
            other = kind.variant(base, change, attempt)
            # Some identities have no unseen variant: then checking takes a seen one rather than none.
            if other not in members and (for_checking(other) == checking or attempt - number > 200):
                members.append(other)
                break
    return members


def _render_group(job: tuple[int, bool, str]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    seed, checking, kind = job
    pictures, masks, labels = [], [], []
    rng = np.random.default_rng([7, int(checking), seed])
    for idn in group(seed, checking, KINDS[kind]):
        labels.append(KINDS[kind].labels(idn))
        for _ in range(VIEWS):
            picture, mask = world.render(idn, str(rng.choice(list(world.BACKGROUNDS))), int(rng.integers(2**31)))
            pictures.append(picture)
            masks.append(mask)
    return np.stack(pictures), np.stack(masks), labels


@torch.no_grad()
def _crops(
    pictures: np.ndarray, masks: np.ndarray, seed: int, encoder: torch.nn.Module, decoder: torch.nn.Module
) -> torch.Tensor:
    """Crops uint8 [N,3,96,96]; half of the pictures are decoded from noisy latents, masks are imperfect."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    latents = encoder(images)
    noise = (
        torch.randn(latents.shape, generator=generator) * 0.2 * torch.rand((len(images), 1, 1, 1), generator=generator)
    )
    decoded = decoder(latents + noise).clamp(0, 1)
    images = torch.where(torch.rand((len(images), 1, 1, 1), generator=generator) < 0.5, decoded, images)
    mask = torch.from_numpy(masks).float()[:, None] / 255
    wider, narrower = F.max_pool2d(mask, 3, 1, 1), -F.max_pool2d(-mask, 3, 1, 1)
    choice = torch.rand((len(mask), 1, 1, 1), generator=generator)
    mask = torch.where(choice < 0.2, wider, torch.where(choice < 0.4, narrower, mask))
    return (subject_crop(images, mask[:, 0], world.SIZE) * 255 + 0.5).clamp(0, 255).byte()


def load(name: str, kind: Kind = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops uint8 [groups, members, views, 3, 96, 96] and labels [groups, members, n] of "train" or "check"."""
    saved = np.load(WORK / f"{kind.prefix}_{name}.npy", mmap_mode="c")
    return torch.from_numpy(saved), torch.from_numpy(np.load(WORK / f"{kind.prefix}_{name}_labels.npy"))


def check_scenes(groups: int, kind: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [groups * members * views, 96, 96, 3] and masks of the checking groups, undegraded."""
    made = [_render_group((seed, True, kind)) for seed in range(groups)]
    return np.concatenate([pictures for pictures, _, _ in made]), np.concatenate([masks for _, masks, _ in made])


def load_degrader(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The autoencoder through which half of the images go; what is fine needs the one of sixteen channels."""
    return load_autoencoder(autoencoder.CHANNELS if kind == "plain" else autoencoder.FLOW_CHANNELS)


def main(arguments: list[str]) -> None:
    """Render, degrade, crop and store both sets."""
    parser = argparse.ArgumentParser(prog="run.py crops")
    parser.add_argument("--kind", default="plain", choices=tuple(KINDS))
    parser.add_argument("--groups", type=int, default=TRAINING_GROUPS)
    options = parser.parse_args(arguments)
    kind = KINDS[options.kind]
    torch.set_num_threads(1)
    encoder, decoder = load_degrader(options.kind)
    for name, count, checking in (("check", CHECKING_GROUPS, True), ("train", options.groups, False)):
        crops, labels = [], []
        with get_context("fork").Pool(1) as pool:
            jobs = ((seed, checking, options.kind) for seed in range(count))
            for index, (pictures, masks, rows) in enumerate(pool.imap(_render_group, jobs, chunksize=8)):
                made = _crops(pictures, masks, index, encoder, decoder)
                crops.append(made.view(1 + len(kind.changes), VIEWS, *made.shape[1:]))
                labels.append(rows)
        np.save(WORK / f"{kind.prefix}_{name}.npy", torch.stack(crops).numpy())
        np.save(WORK / f"{kind.prefix}_{name}_labels.npy", np.array(labels))
        log(kind.prefix, name, count, "groups")
