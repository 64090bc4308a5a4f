"""In how few steps does SINE's LoRA guide an edit as well as after its 500? A search, then its winner once.

On toyworld, as fast_siso: --search tries some rates on held-out subjects that take no part in anything else; without it
the winner is measured once against the full tuning, on other subjects. The edit, the guidance and the scores are those
of effect_sine; "tuned" is the tuned model alone with its own prompt: how well it knows the image.

    python toolbox/_load.py benchmarks.fast_sine --search --subjects 3 --out benchmarks/results/search_sine.json
    python toolbox/_load.py benchmarks.fast_sine --out benchmarks/results/fast_sine.json
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, replace
from typing import Any

from . import effect_sine, frame
from .effect_sine import Edit
from .fast_hiper import against
from .fast_siso import SEARCHED, SEED, TESTED, Way

FULL = Way(5e-3, (250, 500))
SEARCH = {"full": FULL, **{f"{rate:g}": Way(rate, (250,)) for rate in (0.003, 0.0075, 0.01)}}
FAST = {"full": replace(FULL, at=(100, 250, 375, 500))}


class Bench(effect_sine.Bench):
    """The pack's own fine-tuning and guidance on toyworld, with another rate and number of steps."""

    def row_of(self, edit: Edit, ways: dict[str, Way]) -> dict[str, Any]:
        """The scores of the base alone and under each way's guidance, and the seconds of the processor."""
        row: dict[str, Any] = {"base": self.scored(edit, self.images(self.world.model, edit, edit.prompt))}
        seconds, own = {}, self.settings
        for name, way in ways.items():
            spent = 0.0
            for at in way.at:
                self.settings = replace(own, learning_rate=way.rate, steps=at)
                begun = time.process_time()
                tuned = self.tune(edit)  # goes on from the last one
                spent += time.process_time() - begun
                alone = self.scored(edit, self.images(tuned, edit, edit.training_prompt))
                scores = self.scored(edit, self.images(self.guided(edit, tuned), edit, edit.prompt))
                row[f"{name} @ {at}"] = {**scores, "tuned": alone["identity"]}
            seconds[name] = spent
        self.settings = own
        row["base"]["tuned"] = row["base"]["identity"]
        return {**row, "more": [seconds]}


def main(arguments: list[str]) -> int:
    """Print and write the figures."""
    options = {"--search": {"action": "store_true", "help": "try all rates on the subjects for that"}}
    run = frame.Run("fast_sine", arguments, {"unet": effect_sine.WORLDS["unet"]}, options, threads=1, subjects=16)
    ways, chosen = (SEARCH, SEARCHED) if run.options.search else (FAST, TESTED)
    edits = effect_sine.edits(max(chosen) + 1, run.options.harder, SEED)
    rows = run.rows(
        [edits[index] for index in chosen][run.options.first :][: run.options.count],
        lambda: Bench(run.settings, run.world),
        functools.partial(Bench.row_of, ways=ways),
    )
    base = f"full @ {FULL.at[-1]}"
    how = {**asdict(run.settings), "ways": {name: asdict(way) for name, way in ways.items()}}
    return run.judged(rows, {"subjects": len(rows), "base": base, "all": against(rows, base)}, True, settings=how)
