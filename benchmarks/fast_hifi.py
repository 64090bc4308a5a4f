"""Do HiFi Tuner's two stages reach their likeness in a third of the updates? A search, then its winner once.

On toyworld, with the masks, the second term and the four images of table2_hifi. Stage one has the preset "fast" of
Train Subject Embedding. --search tries rates of stage two in 3 updates a step instead of 10, on held-out subjects that
take no part in anything else; without it the winner is measured once against the published stages, on other subjects.

    python toolbox/_load.py benchmarks.fast_hifi --search --subjects 4 --out benchmarks/results/search_hifi.json
    python toolbox/_load.py benchmarks.fast_hifi --out benchmarks/results/fast_hifi.json
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, replace
from typing import Any

from ..core.embedding.presets import HIPER
from ..core.fit.presets import FAST, NOISE
from ..core.prompt.conditioning import apply_embedding
from . import frame, subjects, table2_hifi
from .fast_hiper import against
from .fast_siso import SEARCHED, SEED, TESTED
from .subjects import Case
from .table2_hifi import Settings

INNER_STEPS, RATE = 3, 0.02  # of the winner
PUBLISHED = Settings()
STAGE_ONE = replace(PUBLISHED, **HIPER[FAST][NOISE])
SHORT = replace(STAGE_ONE, inner_steps=INNER_STEPS, inner_rate=RATE)
SEARCH = {f"{rate:g}": replace(SHORT, inner_rate=rate) for rate in (5e-3, 0.01, 0.02, 0.04)}
TEST = {"published": PUBLISHED, "fast": SHORT}


class Bench(table2_hifi.Bench):
    """The pack's own code on toyworld, after either stage."""

    def row_of(self, case: Case, ways: dict[str, Settings]) -> dict[str, Any]:
        """The scores after stage one and two of each way, and the seconds of the processor."""
        row, seconds, one = dict[str, Any](), dict[str, float](), {}
        target, base = self.conditioning(case.class_prompt(case.target_place)), self.world.model

        def scores(embedding: Any) -> dict[str, float]:
            positive = apply_embedding(target, embedding.at(0), self.settings.scale, embedding.windows)
            return self.scored(case, self.images(case, base, positive))

        row["prompt alone"] = self.scored(case, self.images(case, base, target))
        for name, self.settings in ways.items():
            first = self.settings.steps, self.settings.learning_rate
            label = f"{first[0]} steps at {first[1]:g}"
            begun = time.process_time()
            if label not in one:
                one[label] = self.embedding(case, True, self.settings.anchor_weight)
                seconds[label] = time.process_time() - begun
                row[label] = scores(one[label])
                begun = time.process_time()
            refined = self.refined(case, one[label])
            seconds[name] = time.process_time() - begun
            row[name] = scores(refined)
        return {**row, "more": [seconds]}


def main(arguments: list[str]) -> int:
    """Print and write the figures."""
    options = {"--search": {"action": "store_true", "help": "try all rates on the subjects for that"}}
    run = frame.Run("fast_hifi", arguments, None, options, threads=1, subjects=24)
    ways, chosen = (SEARCH, SEARCHED) if run.options.search else (TEST, TESTED)
    cases = [subjects.cases(max(chosen) + 1, run.options.harder, SEED)[index] for index in chosen]
    rows = run.rows(
        cases[run.options.first :][: run.options.count],
        lambda: Bench(PUBLISHED),
        functools.partial(Bench.row_of, ways=ways),
    )
    base = next(iter(ways))
    found = {"subjects": len(rows), "base": base, "all": against(rows, base)}
    return run.judged(rows, found, True, settings={name: asdict(way) for name, way in ways.items()})
