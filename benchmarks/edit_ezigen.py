"""Does EZIGen's editing put a subject into a picture, and leave the rest alone? On the small world, counted.

For each held-out subject one picture is rendered; the judge's mask of it is the place of another held-out subject of
that class, of which the adapter is given one picture of its own, cut out on white. Three loops of the pack's own
editing at the published settings (50 steps, the last 0.4 of them, cfg 2, the prompt names class and place alone), with
the background of the matching noise level, the same with the source's pixels pasted in the end, and with the published
background, two steps noisier.

- Outside: PSNR to the source beyond the mask grown by two latent cells, below that of the autoencoder's round trip
  there; so large a margin leaves 6 to 20 % of these small pictures. "To the mask" is without it.
- Identity: the measuring encoder's cosine between the judge's subject crops on white, to the new subject; the source's
  own is the figure to compare with.
- Seen: the share of the new subject's words (colour, tone, texture, its pattern and emblem) that the judge reads off
  the edit, among those in which the two subjects differ.

The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.edit_ezigen --out benchmarks/results/edit_ezigen.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import effect_ezigen, effect_hiper, hosting
from .effect_ezigen import say
from .effect_sine import write

LOOPS, CELLS = 3, 2
BACKGROUND_GATE = 0.3  # dB
EXACT = "exact background"
KINDS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "exact background, pixels pasted": {"paste": True},
    "published background": {"published": True},
}


@dataclass(frozen=True)
class Edit:
    """A picture, and the subject of its class that shall stand in it."""

    source: effect_hiper.Case
    wanted: effect_hiper.Case

    @property
    def prompt(self) -> str:
        """Class and place: what the new subject looks like must come from its picture."""
        from ..toyworld import world

        return world.caption(self.wanted.identity, self.source.source_place, words=("background",))


def edits(count: int) -> list[Edit]:
    """The first `count` held-out subjects, each with the next one of its class."""
    from ..toyworld import world

    found = effect_ezigen.cases(count + 2 * len(world.CLASSES))
    later = [[other for other in found[at + 1 :] if other.identity.cls == one.identity.cls] for at, one in
             enumerate(found[:count])]  # fmt: skip
    return [Edit(one, others[0]) for one, others in zip(found[:count], later, strict=True)]


class Bench(effect_ezigen.Bench):
    """The small world's models and measures, and the pack's own editing on them."""

    def __init__(self, adapter: Path, ratio: float) -> None:
        super().__init__(adapter)
        self.ratio = ratio

    def edited(self, edit: Edit, subject: Any, mask: Any, **kind: Any) -> Any:
        """The edited picture [1, 96, 96, 3]."""
        import torch

        from ..core.ezigen.host.staged_edit import EditPrompts, EditSettings, edited
        from ..core.ezigen.staged import Loops

        empty = self.conditioning("")
        prompts = EditPrompts(self.conditioning(edit.prompt), empty, empty)
        settings = EditSettings(edit.source.seed, split_ratio=self.ratio, loops=Loops(LOOPS, LOOPS), **kind)
        with torch.inference_mode():
            source = self.picture(edit.source)
            return edited(
                self.world.model, self.world.vae, self.adapter, subject, prompts, source, mask, settings
            ).picture

    def seen(self, edit: Edit, picture: Any) -> float:
        """The share of the differing attributes that the judge reads as the new subject's."""
        from ..toyworld.evaluation import all_labels
        from ..toyworld.judge import HEADS

        old, new = (all_labels(case.identity, edit.source.source_place) for case in (edit.source, edit.wanted))
        answers = self.judge.attributes(picture.movedim(-1, 1))
        told = [int(answers[name]) == b for name, a, b in zip(HEADS, old, new, strict=True) if a != b]
        return sum(told) / len(told)

    def row(self, edit: Edit) -> dict[str, Any]:
        """All figures of one case."""
        import torch
        import torch.nn.functional as F

        from ..core.vision.measures import psnr

        with torch.inference_mode():
            source = self.picture(edit.source)
            mask = (self.judge.mask(source.movedim(-1, 1)) > 0.5).float()
            bare = self.world.vae.decode(self.world.vae.encode(source))
            reach = 8 * CELLS
            beyond = 1 - F.max_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]
        subject = self.subject(edit.wanted)

        def scores(picture: Any) -> dict[str, float]:
            figures = {"outside": beyond, "to the mask": 1 - mask}
            return {
                **{name: float(psnr(picture, source, weight)) for name, weight in figures.items()},
                "identity": self.identity(edit.wanted, picture.movedim(-1, 1)),
                "seen": self.seen(edit, picture),
            }

        found: dict[str, Any] = {"source": scores(source), "round trip": scores(bare), "share": float(beyond.mean())}
        return found | {name: scores(self.edited(edit, subject, mask, **kind)) for name, kind in KINDS.items()}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, how far each edit stays below the round trip, paired gains of identity over the source, and the gate."""
    from ..core.vision.measures import paired_interval

    found: dict[str, Any] = {"cases": len(rows), "share of the picture": sum(row["share"] for row in rows) / len(rows)}
    for kind in ("source", "round trip", *KINDS):
        found[kind] = {score: sum(row[kind][score] for row in rows) / len(rows) for score in rows[0][kind]}
    for kind in KINDS:
        for score in ("outside", "to the mask"):
            below = [row["round trip"][score] - row[kind][score] for row in rows]
            found[kind][f"{score}, below the round trip"] = vars(paired_interval(below))
            found[kind][f"{score}, below the round trip"]["worst"] = max(below)
        gain = [row[kind]["identity"] - row["source"]["identity"] for row in rows]
        found[kind]["identity gained"] = vars(paired_interval(gain))
    below = found[EXACT]["outside, below the round trip"]
    found["gates held"] = below["mean"] <= BACKGROUND_GATE and found[EXACT]["identity gained"]["low"] > 0
    return found


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    from ..toyworld.assets import ASSETS

    parser = argparse.ArgumentParser(prog="benchmarks.edit_ezigen")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "adapter.safetensors", help="in the narrow form")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=effect_ezigen.RATIO, help="the split ratio")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench, rows = Bench(options.adapter, options.ratio), []
    for edit in edits(options.cases):
        words = [" ".join(word for word in vars(case.identity).values() if word) for case in (edit.source, edit.wanted)]
        rows.append({"subject": " -> ".join(words), **bench.row(edit)})
        parts = {kind: part for kind, part in rows[-1].items() if isinstance(part, dict)}
        shown = {kind: " ".join(f"{value:.2f}" for value in part.values()) for kind, part in parts.items()}
        say(f"{len(rows):3d} {rows[-1]['subject']}: {shown}")
    result = summary(rows)
    say(json.dumps(result, indent=1))
    write(
        options.out,
        {"settings": {"loops": LOOPS, "cells": CELLS, "ratio": options.ratio}, "summary": result, "rows": rows},
    )
    return int(not result["gates held"])
