"""Is the step that Choose Best Step takes better than the last one? HiPer on toyworld, counted.

The choice sees images of one prompt by the vision models that users connect; the judgement is of other noise, by an
encoder that takes no part in the choice.

    python toolbox/_load.py benchmarks.best_step --out benchmarks/results/best_step.json
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.embedding.artifact import Embedding
from ..core.prompt.conditioning import apply_embedding
from ..toyworld.vision_models import FOLDERS, build_vision_folders
from . import effect_hiper, frame, subjects
from .subjects import Case

OTHER = 1 << 20  # added to a case's seed: the noise of the images that the choice sees


@dataclass(frozen=True)
class Settings(effect_hiper.Settings):
    """The node's defaults."""

    images: int = 3
    most: int = 4


class Bench(effect_hiper.Bench):
    """The pack's own choice on toyworld."""

    def __init__(self, base: Path, settings: Settings) -> None:
        """base: a folder for the vision models that the choice sees with."""
        super().__init__(settings)
        self.trial = settings.images, settings.most
        from ..core.vision.host.vision import load_vision

        folders = build_vision_folders(base / "vision")
        self.encoders = {name: load_vision(folders[FOLDERS[name]]) for name in ("dino", "clip")}

    def chosen(self, case: Case, embedding: Embedding) -> Embedding:
        """The embedding with its best step by images of the target prompt."""
        from ..core.embedding.host.best_step import Trial, choose_step
        from ..core.embedding.host.train import Previews
        from ..core.vision.host.scoring import Request

        prompt, settings, image = case.prompt(case.target_place), self.settings, self.image(case)
        sampling = Previews(
            self.world.vae, self.conditioning(""), settings.sampling_steps, settings.cfg, case.seed + OTHER
        )
        blank = self.noise(0, 1) * 0
        trial = Trial(self.conditioning(prompt), blank, sampling, settings.scale, *self.trial)
        dino, clip = self.encoders["dino"], self.encoders["clip"]
        request = Request(image, image, prompt=prompt, dino=dino, clip=clip)
        return choose_step(self.world.model, embedding, trial, request).embedding

    def row(self, case: Case) -> dict[str, Any]:
        """The scores of the chosen and of the last step, and the seconds of training and choice."""
        last = self.settings.steps
        begun = time.perf_counter()
        embedding = self.train(case, self.settings.tokens, last // 10)
        trained = time.perf_counter()
        best = self.chosen(case, embedding).recommended_step
        done = time.perf_counter()
        target = self.conditioning(case.prompt(case.target_place))

        def scores(step: int) -> dict[str, float]:
            return self.scores(case, apply_embedding(target, embedding.at(step), self.settings.scale))

        return {
            "step": float(best),
            "last": scores(last),
            "best": scores(best),
            "seconds": {"training": trained - begun, "choice": done - trained},
        }


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Paired intervals of the best step against the last one."""
    identity, text = (frame.gain(rows, "best", "last", score) for score in ("identity", "text"))
    return {
        "subjects": len(rows),
        "mean": frame.means(rows, "last", "best"),
        "identity": identity,
        "text": text,
        "chosen before the last": frame.mean(row["step"] < max(each["step"] for each in rows) for row in rows),
        "choice per training second": statistics.median(
            row["seconds"]["choice"] / row["seconds"]["training"] for row in rows
        ),
        "gates held": identity["high"] >= 0 and text["high"] >= 0,
    }


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("best_step", arguments, Settings(), subjects=43)
    rows = run.rows(run.chosen(subjects.cases), lambda: Bench(run.base, run.settings), Bench.row)
    return run.judged(rows, summary(rows), settings={"subjects": len(rows), **asdict(run.settings)})
