"""The prompts on which samples are judged, and the comparison of samples with real renders of the same prompts."""

from __future__ import annotations

import numpy as np
import torch

from . import world
from .dataset import extra_labels, labels
from .judge import HEADS, MAIN_HEADS, Judge

PROMPTS = 96


def held_out_prompts(count: int = PROMPTS, seed: int = 5) -> tuple[list[world.Identity], list[str], torch.Tensor]:
    """Identities, backgrounds and labels [N,4] of held-out combinations, balanced over classes and textures.

    The prompts mention class, colour, texture and background only: `world.caption` with its default words.
    """
    rng = np.random.default_rng([6, seed])
    groups: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {}
    for combination in world.held_out_combinations():
        groups.setdefault((combination[0], combination[2]), []).append(combination)
    for members in groups.values():
        rng.shuffle(members)
    names = sorted(groups)
    chosen: list[tuple[str, ...]] = []
    turn = 0
    while len(chosen) < count:
        for name in names:
            members = groups[name]
            chosen.append(tuple(members[turn % len(members)]))
        turn += 1
    chosen = chosen[:count]
    identities = [
        world.identity(900_000 + 1000 * seed + i, cls=c[0], color=c[1], texture=c[2]) for i, c in enumerate(chosen)
    ]
    return identities, [c[3] for c in chosen], torch.tensor([labels(*c) for c in chosen])


def real_renders(identities: list[world.Identity], backgrounds: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders of the same prompts: pictures [N,3,96,96] in 0..1 and masks [N,96,96] in 0..1."""
    pairs = [
        world.render(idn, place, seed=70_000 + i)
        for i, (idn, place) in enumerate(zip(identities, backgrounds, strict=True))
    ]
    pictures = torch.from_numpy(np.stack([picture for picture, _ in pairs])).permute(0, 3, 1, 2).float() / 255
    return pictures, torch.from_numpy(np.stack([mask for _, mask in pairs])).float() / 255


def accuracy(judge: Judge, pictures: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Percent right per main head and all four together; `truth` is [N,4]."""
    answers = judge.attributes(pictures)
    right = torch.stack([answers[name] == truth[:, i] for i, name in enumerate(MAIN_HEADS)], 1)
    found = {name: 100 * float(right[:, i].float().mean()) for i, name in enumerate(MAIN_HEADS)}
    return {**found, "all four": 100 * float(right.all(1).float().mean())}


def all_labels(idn: world.Identity, background: str) -> tuple[int, ...]:
    """The nine labels of an identity before a background, in the order of HEADS."""
    return labels(idn.cls, idn.color, idn.texture, background) + extra_labels(idn)


def texture_table(judge: Judge, pictures: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Percent of right textures by texture."""
    found = judge.attributes(pictures)["texture"]
    return {name: 100 * float((found[truth[:, 2] == i] == i).float().mean()) for i, name in enumerate(world.TEXTURES)}


def head_accuracy(judge: Judge, pictures: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Percent right for all nine heads; `truth` is [N,9] in the order of HEADS."""
    answers = judge.attributes(pictures)
    return {name: 100 * float((answers[name] == truth[:, i]).float().mean()) for i, name in enumerate(HEADS)}


def to_uint8(pictures: torch.Tensor) -> list[np.ndarray]:
    """Pictures [N,3,H,W] in 0..1 as a list of uint8 arrays [H,W,3]."""
    return list((pictures.permute(0, 2, 3, 1) * 255 + 0.5).clamp(0, 255).byte().numpy())
