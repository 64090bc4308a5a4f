"""In how few images does SISO's LoRA reach the likeness of its published 50? A search, then its winner once.

On toyworld's student of one step (or the flow transformer's), from the noise of the seed, as published, and with a new
noise in every iteration. --search tries some rates on held-out subjects that take no part in anything else. Without it
the winner is measured once against the published number of images, on other subjects. Both are judged after several
numbers of images: on the trained image, and on another prompt from four other noises, by an encoder that no loss uses.

    python toolbox/_load.py benchmarks.fast_siso --search --out benchmarks/results/search_siso.json
    python toolbox/_load.py benchmarks.fast_siso --out benchmarks/results/fast_siso.json
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import effect_siso, frame, subjects
from .effect_siso import NEW, Arm, Trained
from .fast_hiper import against

SEED = 700_000  # of the first subject: no other benchmark has these
SEARCHED, TESTED = range(24, 32), range(24)
WORLDS = {name: effect_siso.WORLDS[name] for name in ("turbo", "flow_turbo")}
ONE, ANEW = replace(effect_siso.FULL, name="one noise"), NEW
SCORES = ("identity", "text", "obeyed")
Ways = dict[str, "Way"]


@dataclass(frozen=True)
class Way:
    """A setting of the optimisation. at: the images after which it is judged, the last of them its end."""

    rate: float
    at: tuple[int, ...]


PUBLISHED = Way(4e-3, (10, 25, 50))
SEARCH = {
    "published": PUBLISHED,
    **{f"{rate:g}": Way(rate, (15, 25)) for rate in (0.006, 0.008, 0.012, 0.016)},
}
FAST = {ONE: Way(6e-3, (15, 25)), ANEW: Way(8e-3, (15, 25))}


class Bench(effect_siso.Bench):
    """The pack's own optimisation on toyworld, with another rate and number of images."""

    def judged_twice(self, trained: Trained, lora: dict | None, image: Any = None) -> dict[str, float]:
        """The scores of the trained image, by default the one that the seed's noise gives, and those elsewhere."""
        image = self.reused(trained, lora, others=False, again=True) if image is None else image
        both = {"": (image, False), " elsewhere": (self.reused(trained, lora, others=True), True)}
        scored = {where: self.scored(trained, *each) for where, each in both.items()}
        return {score + where: scored[where][score] for where in both for score in SCORES}

    def row_of(self, case: subjects.Case, arms: dict[Arm, Ways]) -> dict[str, Any]:
        """The scores without a LoRA and with each way's, and the seconds of the processor."""
        row: dict[str, Any] = {"without": self.judged_twice(Trained(case, ONE), None)}
        seconds, own = {}, self.settings
        for arm, ways in arms.items():
            trained = Trained(case, arm)
            for name, way in ways.items():
                label, spent = f"{arm.name}, {name}", 0.0
                for at in way.at:
                    self.settings = replace(own, learning_rate=way.rate, iterations=at)
                    begun = time.process_time()
                    found = self.optimised(trained)  # goes on from the last one
                    spent += time.process_time() - begun
                    image = None if arm.new_noise else found.images.movedim(-1, 1)[found.best : found.best + 1]
                    scores = self.judged_twice(trained, found.lora, image)
                    row[f"{label} @ {at}"] = {**scores, "images": float(len(found.losses))}
                seconds[label] = spent
        self.settings = own
        return {**row, "more": seconds}


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Every way's means and paired differences to the published number of images, of either kind of noise."""
    base, found = f"published @ {PUBLISHED.at[-1]}", {}
    for arm in (ONE, ANEW):
        own = [{k: v for k, v in row.items() if k == "without" or k.startswith(arm.name)} for row in rows]
        found[arm.name] = against(own, f"{arm.name}, {base}")
    return {"subjects": len(rows), "base": base, "all": found}


def main(arguments: list[str]) -> int:
    """Print and write the figures."""
    options = {
        "--search": {"action": "store_true", "help": "try all rates on the subjects for that"},
    }
    run = frame.Run("fast_siso", arguments, WORLDS, options, threads=1, subjects=24)
    searched = run.options.search
    arms = {arm: SEARCH if searched else {"published": PUBLISHED, "fast": fast} for arm, fast in FAST.items()}
    chosen = SEARCHED if searched else TESTED
    cases = [subjects.cases(max(chosen) + 1, run.options.harder, SEED)[index] for index in chosen]
    rows = run.rows(
        cases[run.options.first :][: run.options.count],
        lambda: Bench(run.base, run.settings, run.world),
        lambda bench, case: bench.row_of(case, arms),
    )
    how = {
        **asdict(run.settings),
        "ways": {f"{arm.name}, {name}": asdict(way) for arm, ways in arms.items() for name, way in ways.items()},
    }
    return run.judged(rows, summary(rows), True, settings=how)
