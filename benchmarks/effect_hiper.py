"""Does a HiPer embedding bring the subject along, and does the image still obey the prompt? On toyworld, counted.

For each held-out subject one image is rendered, an embedding is trained with the pack's own code, and images of the
subject in another place are sampled from the same noise with and without it. The prompt of the source's place shows how
low the text score can fall.

    python toolbox/_load.py benchmarks.effect_hiper --out benchmarks/results/effect_hiper.json
    python toolbox/_load.py benchmarks.effect_hiper --sweep --out benchmarks/results/sweep_hiper.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.embedding.hiper import HiPerSettings
from ..core.prompt.conditioning import apply_embedding
from . import frame, subjects
from .subjects import Case

WON_GATE, TEXT_GATE = 0.80, 1 / 3


@dataclass(frozen=True)
class Settings:
    """The node's defaults."""

    steps: int = 1000
    tokens: int = 5
    scale: float = 0.8
    learning_rate: float = 5e-3
    cfg: float = 4.0
    samples: int = 4
    sampling_steps: int = 20


# The flow transformer reads the text encoder's values before their normalisation, which are larger: so is its rate.
WORLDS = {"unet": Settings(), "flow": Settings(steps=250, learning_rate=0.2)}


class Bench(subjects.Bench):
    """The pack's own training on toyworld."""

    def __init__(self, settings: Settings, world: str = subjects.NARROW[0]) -> None:
        super().__init__(world)
        self.settings = settings

    @torch.inference_mode()
    def train(self, case: Case, tokens: int, save_every: int) -> Any:
        """The embedding of a case."""
        from ..core.embedding.host.train import Schedule, train_embedding
        from ..core.session.images import TrainingImages

        subject = TrainingImages(self.world.vae.encode(self.image(case)), None)
        settings = HiPerSettings(tokens=tokens, learning_rate=self.settings.learning_rate, seed=case.seed)
        prompt, schedule = self.conditioning(case.prompt(case.source_place)), Schedule(self.settings.steps, save_every)
        return train_embedding(self.world.model, prompt, subject, settings, schedule)[0]

    def scores(self, case: Case, positive: list) -> dict[str, float]:
        """The scores of a prompt's images, from the case's own noise."""
        return self.judged(case, self.sampled(self.world.model, positive, case.seed, self.settings))

    def row(self, case: Case) -> dict[str, Any]:
        """The target prompt alone and with the embedding, and the source prompt alone."""
        steps = self.settings.steps
        embedding = self.train(case, self.settings.tokens, steps)
        target, source = (self.conditioning(case.prompt(place)) for place in (case.target_place, case.source_place))
        return {
            "without": self.scores(case, target),
            "with": self.scores(case, apply_embedding(target, embedding.at(steps), self.settings.scale)),
            "source prompt": self.scores(case, source),
            "real render": self.control(case),
        }

    def swept(self, case: Case) -> dict[tuple[int, int, float], dict[str, float]]:
        """The scores over the number of tokens, the step and the scale."""
        steps, found = self.settings.steps, {}
        target = self.conditioning(case.prompt(case.target_place))
        for tokens in (1, 3, 5, 10):
            embedding = self.train(case, tokens, max(1, steps // 5))
            points = [(tokens, step, 0.8) for step in embedding.rows]
            if tokens == 5:
                points += [(tokens, steps, scale) for scale in (0.4, 0.6, 1.0, 1.2)]
            for point in points:
                positive = apply_embedding(target, embedding.at(point[1]), point[2])
                found[point] = self.scores(case, positive)
        return found


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Paired interval of the gain, share of subjects won, and the part of the text gap that was lost."""
    mean, gain = frame.means(rows), frame.gain(rows, "with", "without", "identity")
    text = {kind: scores["text"] for kind, scores in mean.items()}
    lost = (text["without"] - text["with"]) / (text["without"] - text["source prompt"])
    return {
        "subjects": len(rows),
        "identity without": mean["without"]["identity"],
        "identity with": mean["with"]["identity"],
        "identity of real renders": mean["real render"]["identity"],
        "gain": gain,
        "text": text,
        "share of the text gap lost": lost,
        "gates held": gain["low"] > 0 and gain["share_won"] >= WON_GATE and lost < TEXT_GATE,
    }


def sweep(found: list[dict[tuple[int, int, float], dict[str, float]]]) -> list[dict[str, float]]:
    """The means over the subjects."""
    return [
        {
            **dict(zip(("tokens", "step", "scale"), point, strict=True)),
            **{score: frame.mean(each[point][score] for each in found) for score in ("identity", "text")},
        }
        for point in sorted(found[0])
    ]


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    options = {"--sweep": {"action": "store_true", "help": "vary tokens, steps and scale instead"}}
    run = frame.Run("effect_hiper", arguments, WORLDS, options, subjects=24)
    chosen, settings = run.chosen(subjects.cases), {"subjects": run.options.count, **asdict(run.settings)}
    if run.options.sweep:
        bench = Bench(run.settings, run.world)
        points = sweep([bench.swept(case) for case in chosen])
        frame.say("\n".join(map(json.dumps, points)))
        seeds = [case.seed for case in chosen]
        frame.write(run.options.out, {"settings": {**settings, "seeds": seeds}, "points": points})
        return 0
    rows = run.rows(chosen, lambda: Bench(run.settings, run.world), Bench.row)
    return run.judged(rows, summary(rows), settings=settings)
