"""In how few passes does HiPer reach the likeness of its published 1000? A search, then its winner once. On toyworld.

--search tries many settings on a few held-out subjects, which take no part in anything else. Without it, the winner is
measured once against the published setting on other held-out subjects, half of them with fine parts. Both are judged
after several numbers of passes, on images of the subject in another place, by an encoder that no loss uses.

    python toolbox/_load.py benchmarks.fast_hiper --search --out benchmarks/results/search_hiper.json
    python toolbox/_load.py benchmarks.fast_hiper --out benchmarks/results/fast_hiper.json
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.embedding.hiper import LEARNING_RATE, HiPer, HiPerSettings
from ..core.fit.fit import step_generator
from ..core.fit.runs import digest
from ..core.prompt.conditioning import apply_embedding
from . import effect_hiper, frame, subjects
from .subjects import Case

# Which subjects, by number, of those without fine parts and of those with them. On the tested no rate was ever tried.
SEARCHED = {"unet": ((36, 37, 38), (39, 40, 41)), "flow": ((36, 37), (39, 40))}
TESTED = {
    "unet": ((1, 2, 4, 6, 8, 9, 12, 13, 15, 17, 18, 19, 21, 22, 23), tuple(range(8, 17))),
    "flow": (tuple(range(24, 32)), tuple(range(8, 16))),
}
STORED = Path(__file__).parent / "results" / "effect_hiper.json"  # the published training of the first 24, on "unet"


@dataclass(frozen=True)
class Way:
    """A setting of the training. at: the passes after which it is judged, the last of them its end; warm: updates in
    which the rate rises to its own; falls: it falls like a cosine, to zero at the end; middle: timesteps are drawn
    around the middle (logit-normal); start_percent and end_percent: those of the node.
    """

    rate: float
    at: tuple[int, ...]
    warm: int = 0
    falls: bool = False
    middle: bool = False
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    def varied(self) -> bool:
        """Whether it asks for more than the pack's own training."""
        return bool(self.warm) or self.falls or self.middle

    def rate_of(self, step: int) -> float:
        """The learning rate of the update after `step` updates."""
        rate = self.rate * min(1.0, (step + 1) / max(1, self.warm))
        return rate * (1 + math.cos(math.pi * step / self.at[-1])) / 2 if self.falls else rate


PUBLISHED = Way(LEARNING_RATE, (100, 300, 1000))
SEARCH = {
    "unet": {
        "0.04": Way(0.04, (100, 200, 300)),
        "0.06": Way(0.06, (100, 200, 300)),
        "0.1": Way(0.1, (100, 200)),
        "0.06, warm, falls": Way(0.06, (200,), warm=20, falls=True),
        "0.04, middle": Way(0.04, (100, 200, 300), middle=True),
        "0.04, window": Way(0.04, (100, 200, 300), start_percent=0.15, end_percent=0.85),
    },
    "flow": {
        "0.2": Way(0.2, (100, 200, 300)),
        "0.6": Way(0.6, (100, 200, 300)),
        "2": Way(2.0, (100, 200)),
        "0.2, window": Way(0.2, (100, 200, 300), start_percent=0.15, end_percent=0.85),
    },
}
BASE = {"unet": "0.04 @ 300", "flow": "0.2 @ 300"}  # what the others are compared with in the search
FAST = {
    "unet": Way(0.04, (100, 200, 300), start_percent=0.15, end_percent=0.85),
    "flow": Way(0.6, (100, 200, 300)),
}


class Varied(HiPer):
    """The pack's training with a rate that changes, or other timesteps."""

    def __init__(self, *inputs: Any, way: Way) -> None:
        super().__init__(*inputs)
        self.way = way

    def draw(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        index, t, noise = super().draw()
        if self.way.middle:
            normal = torch.randn(1, generator=step_generator(self.settings.seed, self.step, "middle"))
            t = (len(self.levels) * normal.sigmoid()).long()
        return index, t, noise

    def update(self) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.way.rate_of(self.step)
        return super().update()


class Bench(effect_hiper.Bench):
    """The pack's own training on toyworld, and trainings that it does not offer."""

    def trained(self, case: Case, way: Way) -> tuple[Any, list[float]]:
        """The embedding of a case, and its losses."""
        from ..core.embedding.host import train
        from ..core.session.images import TrainingImages
        from ..core.session.job import run

        @dataclass(frozen=True)
        class Job(train.EmbeddingJob):
            def key(self) -> str:
                return digest([super().key(), asdict(way)] if way.varied else super().key())

            def fit(self, denoiser: Any, x0: torch.Tensor) -> Any:
                fit = Varied(*self.inputs(denoiser, x0), way=way)
                return fit, lambda: {"": fit.h.detach().clone()[None]}

        model, prompt = self.world.model, self.conditioning(case.prompt(case.source_place))
        with torch.inference_mode():
            subject = TrainingImages(self.world.vae.encode(self.image(case)), None)
            settings = HiPerSettings(tokens=self.settings.tokens, learning_rate=way.rate, seed=case.seed)
            window = way.start_percent, way.end_percent
            schedule = train.Schedule(way.at[-1], math.gcd(*way.at), *window)
            if not way.varied:
                return train.train_embedding(model, prompt, subject, settings, schedule)
            _, start, placement = train.source_rows(model, prompt, None, settings.tokens)
            job = Job(model, prompt, subject, settings, placement, start, None, schedule)
            done = run(job)
            saved = {step: result[""] for step, result in done.results.items()}
            return train.Embedding(saved, job.header(done.step, done.losses)), done.losses

    def row_of(self, case: Case, ways: dict[str, Way]) -> dict[str, Any]:
        """The scores of the target prompt with each embedding after each number of passes; seconds of the processor,
        and the means of each tenth of the losses.
        """
        target = self.conditioning(case.prompt(case.target_place))
        row, seconds, losses = dict[str, Any](), {}, {}
        for name, way in ways.items():
            begun = time.process_time()
            embedding, each = self.trained(case, way)
            seconds[name] = time.process_time() - begun
            losses[name] = [float(part.mean()) for part in torch.tensor_split(torch.tensor(each), 10)]
            for at in way.at:
                placed = apply_embedding(target, embedding.at(at), self.settings.scale)
                row[f"{name} @ {at}"] = self.scores(case, placed)
        return {**row, "more": [seconds, losses]}

    def tested(self, case: Case, fast: Way, stored: frame.Rows) -> dict[str, Any]:
        """The winner and the published training, which is taken from a stored row of the case if there is one."""
        known = [row for row in stored if row["subject"] == case.label]
        if known:
            published = {"without": known[0]["without"], f"published @ {PUBLISHED.at[-1]}": known[0]["with"]}
            return {**published, **self.row_of(case, {"fast": fast})}
        without = self.scores(case, self.conditioning(case.prompt(case.target_place)))
        return {"without": without, **self.row_of(case, {"published": PUBLISHED, "fast": fast})}


def chosen(parts: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[Case, str]:
    """The cases of both sets with the name of their set, by turns, so that the first few are of both."""
    plain, fine = (
        [subjects.cases(max(part) + 1, harder)[each] for each in part]
        for part, harder in zip(parts, (False, True), strict=True)
    )
    sets = [{case: name for case in cases} for cases, name in ((plain, "plain"), (fine, "fine parts"))]
    turns = [(at / len(each), name, case) for each in sets for at, (case, name) in enumerate(each.items())]
    return {case: name for _, name, case in sorted(turns, key=lambda turn: turn[:2])}


def against(rows: frame.Rows, base: str) -> dict[str, Any]:
    """Of each setting and number of passes that all rows have: the means, and the paired differences to the base."""
    kinds = [name for name in frame.kinds_of(rows) if all(name in row for row in rows)]
    return {
        kind: {
            **scores,
            **{f"{score} - base": frame.gain(rows, kind, base, score) for score in scores if kind != base},
        }
        for kind, scores in frame.means(rows, *kinds).items()
    }


def stopped(rows: frame.Rows, fast: Way) -> dict[str, Any]:
    """What the winner would save and lose if it stopped at its second look, where that is no more alike than the first
    (by the judge itself; a run would have to look with other eyes).
    """
    first, second, last = (f"fast @ {at}" for at in fast.at)
    ends = [second if row[second]["identity"] <= row[first]["identity"] else last for row in rows]
    scores = ("identity", "text")
    lost = {s: frame.interval(row[end][s] - row[last][s] for row, end in zip(rows, ends, strict=True)) for s in scores}
    share = frame.mean(end == second for end in ends)
    return {"stopped": share, "steps saved": share * (1 - fast.at[1] / fast.at[2]), "minus the end": lost}


def summary(rows: frame.Rows, fast: Way) -> dict[str, Any]:
    """The winner against the published training at its end, over all subjects and over either set."""
    base, last = f"published @ {PUBLISHED.at[-1]}", f"fast @ {fast.at[-1]}"
    sets = {name: [row for row in rows if row["set"] == name] for name in sorted({row["set"] for row in rows})}
    found = against(rows, base)
    gates = {score: found[last][f"{score} - base"]["high"] >= 0 for score in ("identity", "text")}
    figures = {"subjects": len(rows), "base": base, "all": found, "early choice": stopped(rows, fast)}
    return frame.gated({**figures, **{name: against(part, base) for name, part in sets.items()}}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the winner is surely less alike or follows the prompt less."""
    options = {
        "--search": {"action": "store_true", "help": "try all settings on the subjects for that"},
        "--ways": {"nargs": "+", "help": "only these of them"},
    }
    run = frame.Run("fast_hiper", arguments, effect_hiper.WORLDS, options, threads=1, subjects=24)
    searched, fast = run.options.search, FAST[run.world]
    ways = SEARCH[run.world] if searched else {"published": PUBLISHED, "fast": fast}
    ways = {name: way for name, way in ways.items() if name in (run.options.ways or ways)}
    sets = chosen((SEARCHED if searched else TESTED)[run.world])
    stored = json.loads(STORED.read_text())["rows"] if run.world == "unet" else []

    def row(bench: Bench, case: Case) -> dict[str, Any]:
        return bench.row_of(case, ways) if searched else bench.tested(case, fast, stored)

    rows = run.rows(
        list(sets)[run.options.first :][: run.options.count],
        lambda: Bench(run.settings, run.world),
        row,
        lambda case: {"subject": case.label, "set": sets[case]},
    )
    how = {name: value for name, value in asdict(run.settings).items() if name not in ("steps", "learning_rate")}
    how = {"subjects": len(rows), **how, "ways": {name: asdict(way) for name, way in ways.items()}}
    base = BASE.get(run.world, "") if not run.options.ways else next(iter(frame.kinds_of(rows)))
    found = {"base": base, "all": against(rows, base)} if searched else summary(rows, fast)
    return run.judged(rows, found, searched or None, settings=how)
