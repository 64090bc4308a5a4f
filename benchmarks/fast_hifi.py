"""Do HiFi Tuner's two stages reach their likeness in a third of the updates? A search, then its winner once.

On toyworld, with the masks, the second term and the four images of table2_hifi. Stage one has the preset "fast" of
Train Subject Embedding. --search tries rates of stage two in 3 updates a step instead of 10, on held-out subjects that
take no part in anything else. Without it the winner is measured once against the published stages, whose scores are
those of table2_hifi's stored rows: on its subjects no other rate was ever tried.

    python toolbox/_load.py benchmarks.fast_hifi --search --subjects 2 --out benchmarks/results/search_hifi.json
    python toolbox/_load.py benchmarks.fast_hifi --out benchmarks/results/fast_hifi.json
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..core.embedding.presets import FAST_HIPER
from ..core.prompt.conditioning import apply_embedding
from . import frame, subjects, table2_hifi
from .fast_hiper import against
from .fast_siso import SEARCHED, SEED
from .subjects import Case
from .table2_hifi import Settings

STORED = Path(__file__).parent / "results" / "table2_hifi.json"
STAGES = {"prompt alone": "prompt alone", "published, stage one": "+ regularisation", "published": "+ step-wise"}
INNER_STEPS, RATE = 3, 0.02  # of the winner
SHORT = replace(Settings(), **FAST_HIPER, inner_steps=INNER_STEPS, inner_rate=RATE)
PUBLISHED_RATE = 5e-3
SEARCH = {f"{rate:g}": replace(SHORT, inner_rate=rate) for rate in (PUBLISHED_RATE, 0.01, RATE)}
# Updates a step of stage two, after the fast stage one.
LENGTHS = {"fast": (RATE, (1, INNER_STEPS)), "published rate": (PUBLISHED_RATE, (5, 10))}
TEST = {
    f"{name} @ {each * SHORT.sampling_steps}": replace(SHORT, inner_steps=each, inner_rate=rate)
    for name, (rate, lengths) in LENGTHS.items()
    for each in lengths
}


class Bench(table2_hifi.Bench):
    """The pack's own code on toyworld, after either stage."""

    def row_of(self, case: Case, ways: dict[str, Settings]) -> dict[str, Any]:
        """The scores after stage one, which all ways share, and two, and the seconds of the processor."""
        target, base = self.conditioning(case.class_prompt(case.target_place)), self.world.model

        def scores(embedding: Any) -> dict[str, float]:
            positive = apply_embedding(target, embedding.at(0), self.settings.scale, embedding.windows)
            return self.scored(case, self.images(case, base, positive))

        self.settings = SHORT
        begun = time.process_time()
        first = self.embedding(case, True, SHORT.anchor_weight)
        seconds = {"stage one": time.process_time() - begun}
        row = {"fast, stage one": scores(first)}
        for name, self.settings in ways.items():
            begun = time.process_time()
            refined = self.refined(case, first)
            seconds[name] = time.process_time() - begun
            row[name] = scores(refined)
        return {**row, "more": [seconds]}


def main(arguments: list[str]) -> int:
    """Print and write the figures."""
    options = {"--search": {"action": "store_true", "help": "try all rates on the subjects for that"}}
    run = frame.Run("fast_hifi", arguments, None, options, threads=1, subjects=16)
    if run.options.search:
        ways, base, known = SEARCH, "0.005", {}
        cases = [subjects.cases(max(SEARCHED) + 1, seed=SEED)[index] for index in SEARCHED][: run.options.count]
    else:
        ways, base, cases = TEST, "published", run.chosen(subjects.cases)
        known = {row["subject"]: row for row in json.loads(STORED.read_text())["rows"]}
    stored = {case: {name: known[case.label][kind] for name, kind in STAGES.items()} for case in cases if known}
    rows = run.rows(
        cases,
        lambda: Bench(SHORT),
        lambda bench, case: {**stored.get(case, {}), **bench.row_of(case, ways)},
    )
    found = {"subjects": len(rows), "base": base, "all": against(rows, base)}
    if known:
        pair = "fast, stage one", "published, stage one"
        found["stage one minus published"] = {score: frame.gain(rows, *pair, score) for score in ("identity", "text")}
    return run.judged(rows, found, True, settings={name: asdict(way) for name, way in ways.items()})
