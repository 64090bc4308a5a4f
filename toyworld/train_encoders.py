"""Stage "encoders": train the identity encoders `dino`, `measure` and `fine` by contrast against hard negatives.

Besides the contrastive loss, linear heads read the attributes from the features while training; they are thrown away.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from . import fine, subjects, training
from .training import RANK, WORK, log
from .vision_models import MAKERS, features

WIDTHS = {"dino": 96, "measure": 128, "fine": 128}
SEEDS = {"dino": 11, "measure": 29, "fine": 37}
TEMPERATURE = 0.1
# Class, colour, texture, pattern colour, angle, emblem shape, emblem colour, tone.
ATTRIBUTES = (8, 7, 4, 3, 4, 4, 5, 3)


def kind_of(name: str) -> subjects.Kind:
    """The subjects that an encoder is to know apart."""
    return subjects.KINDS["fine" if name == "fine" else "plain"]


class Heads(nn.Module):
    """Attribute heads of the training: one linear layer per attribute with `counts` answers."""

    def __init__(self, width: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.read = nn.ModuleList([nn.Linear(width, count) for count in counts])

    def loss(self, found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the attributes; labels [B, attributes]."""
        return sum(F.cross_entropy(head(found), labels[:, i]) for i, head in enumerate(self.read)) / len(self.read)


def augment(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, scale and rotate a little, change brightness, sometimes blur; crops [B,3,S,S] in 0..1 on white."""
    batch = len(crops)
    scale, angle, shift = 0.08, 0.08, 0.06
    draw = torch.rand((batch, 5), generator=generator) * 2 - 1
    zoom, turn = 1 + scale * draw[:, 0], angle * draw[:, 1]
    matrix = torch.stack(
        [
            zoom * turn.cos(),
            -zoom * turn.sin(),
            shift * draw[:, 2],
            zoom * turn.sin(),
            zoom * turn.cos(),
            shift * draw[:, 3],
        ],
        1,
    ).view(batch, 2, 3)
    grid = F.affine_grid(matrix, list(crops.shape), align_corners=False)
    crops = 1 - F.grid_sample(1 - crops, grid, align_corners=False)
    blur = torch.rand((batch, 1, 1, 1), generator=generator) < 0.3
    crops = torch.where(blur, F.avg_pool2d(crops, 3, 1, 1, count_include_pad=False), crops)
    return (crops * (1 + 0.04 * draw[:, 4].view(-1, 1, 1, 1))).clamp(0, 1)


def contrast(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """InfoNCE in both directions: row i of `first` belongs to row i of `second` and to no other."""
    scores = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / TEMPERATURE
    wanted = torch.arange(len(first))
    return (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a positive similarity exceeds a negative one (ties count half)."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive, right=False) + torch.searchsorted(order, positive, right=True)
    return float(below.double().mean() / (2 * len(order)))


@torch.no_grad()
def hard_auc(model: nn.Module, crops: torch.Tensor, kind: subjects.Kind = subjects.PLAIN) -> dict[str, float]:
    """AUC of same identity against each hard negative and against all; crops [groups,members,views,3,S,S] uint8."""
    model.train(False)
    flat = crops.flatten(0, 2)
    found = torch.cat([F.normalize(features(model, part.float() / 255), dim=1) for part in flat.split(128)])
    found = found.view(*crops.shape[:3], -1)
    pairs = [(a, b) for a in range(crops.shape[2]) for b in range(crops.shape[2]) if a != b]
    same = torch.cat([(found[:, 0, a] * found[:, 0, b]).sum(-1) for a, b in pairs])
    other = [torch.cat([(found[:, 0, a] * found[:, k, b]).sum(-1) for a, b in pairs]) for k in range(1, crops.shape[1])]
    result = {name: auc(same, other[k]) for k, name in enumerate(kind.changes)}
    first_two = " or ".join(kind.changes[:2])
    return {**result, "all": auc(same, torch.cat(other)), first_two: auc(same, torch.cat(other[:2]))}


def main(arguments: list[str]) -> None:
    """Train one encoder and write <name>.pt."""
    parser = argparse.ArgumentParser(prog="run.py encoders")
    parser.add_argument("name", choices=tuple(WIDTHS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--groups", type=int, default=8, help="groups of identities per process and step")
    options = parser.parse_args(arguments)
    kind = kind_of(options.name)
    training.start()
    crops, labels = subjects.load("train", kind)
    check, _ = subjects.load("check", kind)
    torch.manual_seed(SEEDS[options.name])
    counts = ATTRIBUTES + fine.LABELS if options.name == "fine" else ATTRIBUTES
    model, heads = MAKERS[options.name](), Heads(WIDTHS[options.name], counts)
    ends = ("embeddings.", "embedder.embedder.convolution")
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim in (2, 4) and not name.startswith(ends)]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen] + list(heads.parameters())
    optimiser = training.Muon(matrices, others, rate=0.01, adam_rate=2e-3)
    keeper = training.Keeper(options.name, {"model": model, "heads": heads, "optimiser": optimiser})
    first, began = keeper.resume(), time.time()
    for step in range(first, options.steps):
        model.train()
        generator = training.step_generator(SEEDS[options.name], step)
        rows = torch.randint(len(crops), (options.groups,), generator=generator)
        one, two = torch.randperm(crops.shape[2], generator=generator)[:2].tolist()
        truth = labels[rows].flatten(0, 1)
        views = [augment(crops[rows, :, view].flatten(0, 1).float() / 255, generator) for view in (one, two)]
        found = features(model, torch.cat(views))
        loss = contrast(*found.chunk(2)) + heads.loss(found, torch.cat([truth, truth]))
        loss.backward()
        optimiser.step(training.schedule(step, options.steps, warm_up=40, decay_from=0.3), clip=5.0)
        if (step + 1) % 100 == 0:
            log(
                step + 1,
                f"loss {loss.item():.3f}",
                f"{(step + 1 - first) / (time.time() - began):.2f} steps/s",
                hard_auc(model, check[:60], kind) if RANK == 0 else "",
            )
        keeper.save(step + 1, now=step + 1 == options.steps)
    if RANK == 0:
        log(options.name, hard_auc(model, check, kind))
        torch.save(model.state_dict(), WORK / f"{options.name}.pt")
