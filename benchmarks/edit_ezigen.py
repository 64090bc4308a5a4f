"""Does EZIGen's editing put a subject into an image, and leave the rest alone? On toyworld, counted.

For each held-out subject one image is rendered; the judge's mask of it is the place of another held-out subject of that
class, of which the adapter is given one image of its own, cut out on white. Three loops of the pack's own editing at
the published settings (50 steps, the last 0.4 of them, cfg 2, the prompt names class and place alone), with the
background of the matching noise level, the same with the source's pixels pasted in the end, and with the published
background, two steps noisier.

- Outside: PSNR to the source beyond the mask grown by two latent cells, below that of the autoencoder's round trip
  there; so large a margin leaves 6 to 20 % of these small images. "To the mask" is without it.
- Identity: the measuring encoder's cosine between the judge's subject crops on white, to the new subject; the source's
  own is the figure to compare with.
- Seen: the share of the new subject's words (colour, tone, texture, its pattern and emblem) that the judge reads off
  the edit, among those in which the two subjects differ.

    python toolbox/_load.py benchmarks.edit_ezigen --out benchmarks/results/edit_ezigen.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..core.ezigen.staged import Loops
from ..core.vision.measures import psnr
from ..toyworld import world
from ..toyworld.evaluation import all_labels
from ..toyworld.judge import HEADS
from . import effect_ezigen, frame
from .subjects import Exchange

BACKGROUND_GATE = 0.3  # dB
EXACT = "exact background"
KINDS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "exact background, pixels pasted": {"paste": True},
    "published background": {"published": True},
}


@dataclass(frozen=True)
class Settings:
    """cells: latent cells around the mask that do not count as outside; ratio: the split ratio."""

    loops: int = 3
    cells: int = 2
    ratio: float = effect_ezigen.RATIO


def edits(count: int, harder: bool = False) -> list[Exchange]:
    """The first `count` held-out subjects, each with the next one of its class."""
    found = effect_ezigen.cases(count + 2 * len(world.CLASSES), harder)
    return [
        Exchange(one, next(other for other in found[at + 1 :] if other.identity.cls == one.identity.cls))
        for at, one in enumerate(found[:count])
    ]


class Bench(effect_ezigen.Bench):
    """The pack's own editing on toyworld."""

    @torch.inference_mode()
    def edited(self, edit: Exchange, subject: Any, mask: Any, **kind: Any) -> Any:
        """The edited image [1, 96, 96, 3]."""
        from ..core.ezigen.host.staged_edit import StagedEdit, edit_staged

        # Class and place: what the new subject looks like must come from its image.
        prompt = world.caption(edit.wanted.identity, edit.source.source_place, words=("background",))
        empty, loops = self.conditioning(""), self.settings.loops
        inputs = self.world.model, self.world.vae, self.adapter, subject, self.conditioning(prompt), empty
        settings: dict[str, Any] = {
            "seed": edit.seed,
            "split_ratio": self.settings.ratio,
            "loops": Loops(loops, loops),
            **kind,
        }
        return edit_staged(StagedEdit(*inputs, **settings), self.image(edit.source), mask)[0]

    def seen(self, edit: Exchange, image: Any) -> float:
        """The share of the differing attributes that the judge reads as the new subject's."""
        old, new = (all_labels(case.identity, edit.source.source_place) for case in (edit.source, edit.wanted))
        answers = self.judge.attributes(image.movedim(-1, 1))
        return frame.mean(int(answers[name]) == b for name, a, b in zip(HEADS, old, new, strict=True) if a != b)

    def row_of(self, edit: Exchange) -> dict[str, Any]:
        """All figures of one case."""
        with torch.inference_mode():
            source = self.image(edit.source)
            mask = self.mask(source.movedim(-1, 1))
            bare = self.world.vae.decode(self.world.vae.encode(source))
            reach = 8 * self.settings.cells
            beyond = 1 - F.max_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]
        subject = self.subject(edit.wanted)

        def scores(image: Any) -> dict[str, float]:
            return {
                "outside": float(psnr(image, source, beyond)),
                "to the mask": float(psnr(image, source, 1 - mask)),
                "identity": self.identity(edit.wanted, image.movedim(-1, 1)),
                "seen": self.seen(edit, image),
            }

        found: dict[str, Any] = {"source": scores(source), "round trip": scores(bare), "share": float(beyond.mean())}
        return found | {name: scores(self.edited(edit, subject, mask, **kind)) for name, kind in KINDS.items()}


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means, how far each edit stays below the round trip, paired gains of identity over the source, and the gate."""
    found: dict[str, Any] = {"cases": len(rows), "share of the picture": frame.mean(row["share"] for row in rows)}
    found |= frame.means(rows, "source", "round trip", *KINDS)
    for kind in KINDS:
        for score in ("outside", "to the mask"):
            worst = max(row["round trip"][score] - row[kind][score] for row in rows)
            below = {**frame.gain(rows, "round trip", kind, score), "worst": worst}
            found[kind][f"{score}, below the round trip"] = below
        found[kind]["identity gained"] = frame.gain(rows, kind, "source", "identity")
    below = found[EXACT]["outside, below the round trip"]
    return {**found, "gates held": below["mean"] <= BACKGROUND_GATE and found[EXACT]["identity gained"]["low"] > 0}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    run = frame.Run("edit_ezigen", arguments, Settings(), effect_ezigen.ADAPTER, cases=16)
    rows = run.rows(run.chosen(edits), lambda: Bench(run.options.adapter, run.settings), Bench.row_of)
    return run.judged(rows, summary(rows))
