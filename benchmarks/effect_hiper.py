"""Does a HiPer embedding bring the subject along, and does the picture still obey the prompt? On the small world,
counted.

For each held-out subject one picture is rendered, an embedding is trained with the pack's own code, and pictures of the
subject in another place are sampled from the same noise with and without it. Identity is the measuring encoder's cosine
between the judge's subject crops on white (that encoder is in no loss); the text score is the scorer's cosine with the
target prompt. The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the
cost.

    python toolbox/_load.py benchmarks.effect_hiper --out benchmarks/results/effect_hiper.json
    python toolbox/_load.py benchmarks.effect_hiper --sweep --out benchmarks/results/sweep_hiper.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hosting

SAMPLES, SAMPLING_STEPS, CFG = 4, 20, 4.0
SIDE = 96
WON_GATE, TEXT_GATE = 0.80, 1 / 3


@dataclass(frozen=True)
class Case:
    """A held-out subject, the place of its one picture and the place of the edit; both combinations are held out."""

    identity: Any
    source_place: str
    target_place: str
    seed: int

    def prompt(self, place: str) -> str:
        """Class, colour and place: tone, pattern and emblem of the subject must come from the embedding."""
        from ..toyworld import world

        return world.caption(self.identity, place, words=("color", "background"))


def cases(count: int) -> list[Case]:
    """The first `count` held-out subjects, classes taken in turn."""
    from ..toyworld import world

    places: dict[tuple[str, str, str], list[str]] = {}
    for cls, color, texture, place in world.held_out_combinations():
        places.setdefault((cls, color, texture), []).append(place)
    by_class: dict[str, list[tuple[str, str, str]]] = {}
    for key, found in sorted(places.items()):
        if len(found) >= 2:
            by_class.setdefault(key[0], []).append(key)
    turns = [
        keys[turn] for turn in range(max(map(len, by_class.values()))) for keys in by_class.values() if turn < len(keys)
    ]
    chosen = []
    for index, key in enumerate(turns[:count]):
        identity = world.identity(800_000 + index, *key)
        chosen.append(Case(identity, places[key][0], places[key][1], 800_000 + index))
    return chosen


class Bench:
    """The small world's models and measures, and the pack's own training and sampling on them."""

    def __init__(self) -> None:
        from ..toyworld import narrow
        from ..toyworld.judge import load_judge
        from ..toyworld.vision_models import load_model

        self.world = narrow.load_narrow()
        self.judge, self.measure, self.scorer = load_judge(), load_model("measure"), load_model("clip")

    def conditioning(self, prompt: str) -> list:
        return [[self.world.encode(prompt), {}]]

    def picture(self, case: Case, place: str | None = None):
        """The one picture of the subject, or a real render of it in another place: [1, 96, 96, 3] in 0..1."""
        import torch

        from ..toyworld import world

        pixels, _ = world.render(case.identity, place or case.source_place, case.seed + bool(place))
        return torch.from_numpy(pixels)[None].float() / 255

    def train(self, case: Case, *, tokens: int, steps: int, save_every: int, learning_rate: float):
        """The embedding of a case."""
        import torch

        from ..core.embedding.hiper import HiPerSettings
        from ..core.embedding.host.train import Schedule, train_embedding
        from ..core.session.images import TrainingImages

        with torch.inference_mode():
            latent = self.world.vae.encode(self.picture(case))
            settings = HiPerSettings(tokens=tokens, learning_rate=learning_rate, seed=case.seed)
            prompt = self.conditioning(case.prompt(case.source_place))
            return train_embedding(
                self.world.model, prompt, TrainingImages(latent, None), settings, Schedule(steps, save_every)
            )[0]

    def sample(self, case: Case, positive: list):
        """SAMPLES pictures [N, 3, 96, 96] of a prompt, from the case's own noise."""
        import comfy.sample
        import torch

        shape = (SAMPLES, 4, SIDE // 8, SIDE // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))
        with torch.inference_mode():
            latents = comfy.sample.sample(
                self.world.model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform", positive, self.conditioning(""),
                torch.zeros(shape), disable_pbar=True, seed=case.seed,
            )  # fmt: skip
            return self.world.vae.decode(latents).movedim(-1, 1)

    def identity(self, case: Case, pictures) -> float:
        """Mean cosine of the pictures' subject crops with the source picture's."""
        import torch
        import torch.nn.functional as F

        from ..toyworld.judge import subject_crop
        from ..toyworld.vision_models import features

        with torch.inference_mode():
            both = torch.cat([self.picture(case).movedim(-1, 1), pictures])
            found = F.normalize(features(self.measure, subject_crop(both, self.judge.mask(both), SIDE)), dim=1)
            return float((found[1:] @ found[0]).mean())

    def text(self, prompt: str, pictures) -> float:
        """Mean cosine of the pictures with a prompt."""
        import torch

        from ..toyworld.train_scorer import embeddings, text_inputs

        with torch.inference_mode():
            seen, read, _ = embeddings(self.scorer, pictures, text_inputs(self.world.tokenizer, [prompt]))
            return float((seen @ read[0]).mean())

    def control(self, case: Case) -> dict[str, float]:
        """The scores of a real render of the subject in the target place."""
        return self.judged(case, self.picture(case, case.target_place).movedim(-1, 1))

    def scores(self, case: Case, positive: list) -> dict[str, float]:
        """The scores of a prompt's pictures."""
        return self.judged(case, self.sample(case, positive))

    def judged(self, case: Case, pictures) -> dict[str, float]:
        """Identity and text score (against the target prompt) of pictures."""
        return {"identity": self.identity(case, pictures), "text": self.text(case.prompt(case.target_place), pictures)}


def effect(bench: Bench, count: int, tokens: int, steps: int, scale: float, learning_rate: float) -> list[dict]:
    """For each subject: the target prompt alone, with the embedding, and the source prompt alone (how low text
    can fall).
    """
    from ..core.prompt.conditioning import apply_embedding

    rows = []
    for case in cases(count):
        embedding = bench.train(case, tokens=tokens, steps=steps, save_every=steps, learning_rate=learning_rate)
        target, source = (bench.conditioning(case.prompt(place)) for place in (case.target_place, case.source_place))
        row = {
            "subject": " ".join(word for word in vars(case.identity).values() if word),
            "without": bench.scores(case, target),
            "with": bench.scores(case, apply_embedding(target, embedding.at(steps), scale)),
            "source prompt": bench.scores(case, source),
            "real render": bench.control(case),
        }
        rows.append(row)
        without, with_, source = (row[key] for key in ("without", "with", "source prompt"))
        line = f"{len(rows):3d} identity {without['identity']:.3f} -> {with_['identity']:.3f}, "
        line += f"text {without['text']:.3f} -> {with_['text']:.3f} (source {source['text']:.3f})  {row['subject']}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return rows


def summary(rows: list[dict]) -> dict[str, Any]:
    """Paired interval of the gain, share of subjects won, and the part of the text gap that was lost."""
    from ..core.vision.measures import paired_interval

    without, with_ = ([row[key]["identity"] for row in rows] for key in ("without", "with"))
    interval = paired_interval([b - a for a, b in zip(without, with_, strict=True)])
    kinds = ("without", "with", "source prompt", "real render")
    text = {key: sum(row[key]["text"] for row in rows) / len(rows) for key in kinds}
    lost = (text["without"] - text["with"]) / (text["without"] - text["source prompt"])
    return {
        "subjects": len(rows),
        "identity without": sum(without) / len(rows),
        "identity with": sum(with_) / len(rows),
        "identity of real renders": sum(row["real render"]["identity"] for row in rows) / len(rows),
        "gain": vars(interval),
        "text": text,
        "share of the text gap lost": lost,
        "gates held": bool(interval.low > 0 and interval.share_won >= WON_GATE and lost < TEXT_GATE),
    }


def sweep(bench: Bench, count: int, steps: int, learning_rate: float) -> list[dict]:
    """Identity and text over the number of tokens, the step and the scale, each mean over the subjects."""
    from ..core.prompt.conditioning import apply_embedding

    every = max(1, steps // 5)
    found: dict[tuple[int, int, float], list[dict]] = {}
    for case in cases(count):
        target = bench.conditioning(case.prompt(case.target_place))
        for tokens in (1, 3, 5, 10):
            embedding = bench.train(case, tokens=tokens, steps=steps, save_every=every, learning_rate=learning_rate)
            points = [(tokens, step, 0.8) for step in embedding.rows]
            if tokens == 5:
                points += [(tokens, steps, scale) for scale in (0.4, 0.6, 1.0, 1.2)]
            for point in points:
                scores = bench.scores(case, apply_embedding(target, embedding.at(point[1]), point[2]))
                found.setdefault(point, []).append(scores)
    return [
        {
            "tokens": n,
            "step": step,
            "scale": scale,
            **{k: sum(s[k] for s in scores) / len(scores) for k in ("identity", "text")},
        }
        for (n, step, scale), scores in sorted(found.items())
    ]


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_hiper")
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweep", action="store_true", help="vary tokens, steps and scale instead")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench = Bench()
    settings = {key: getattr(options, key) for key in ("subjects", "steps", "tokens", "scale", "learning_rate")}
    result: dict[str, Any] = {
        "settings": {**settings, "cfg": CFG, "samples": SAMPLES, "sampling_steps": SAMPLING_STEPS}
    }
    if options.sweep:
        result["points"] = sweep(bench, options.subjects, options.steps, options.learning_rate)
        for point in result["points"]:
            sys.stdout.write(json.dumps(point) + "\n")
    else:
        result["rows"] = effect(
            bench, options.subjects, options.tokens, options.steps, options.scale, options.learning_rate
        )
        result["summary"] = summary(result["rows"])
        sys.stdout.write(json.dumps(result["summary"], indent=1) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(not result.get("summary", {}).get("gates held", True))
