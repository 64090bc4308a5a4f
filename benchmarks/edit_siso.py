"""Does the background term of SISO's editing keep the background? On the small world, counted.

For each held-out subject one picture is rendered and inverted by the pack's own ReNoise, with the prompt "a photo of a
<class>". From there a LoRA is optimised against the likeness to another held-out subject of that class, with the
background term (weight 10, the judge's mask of the source) and without.

- Background: mean squared error to the source picture outside of that mask, of the best picture.
- Identity: the measuring encoder's cosine between the judge's subject crops on white, to the other subject.
- DINO: the cosine of whole pictures that is in the loss.

The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.edit_siso --rows ROWS.jsonl --out benchmarks/results/edit_siso.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import effect_hiper, effect_siso, hosting
from .effect_sine import write

SIDE, CLASSES, SHARE_GATE = 96, 8, 0.80
KINDS = {"with the term": 1.0, "without it": 0.0}


@dataclass(frozen=True)
class Settings:
    """SISO's editing on SDXL-turbo; the rate is the small world's own, and its steps are more, as it is no turbo model.

    steps: of the whole schedule, the first `skipped` of which are not taken.
    """

    iterations: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    rank: int = 4
    patience: int = 7
    weight: float = 10.0
    steps: int = 8
    skipped: int = 2
    grad_steps: int = 1


@dataclass(frozen=True)
class Edit:
    """A picture, and the subject of its class that shall stand in it."""

    source: effect_hiper.Case
    wanted: effect_hiper.Case

    @property
    def prompt(self) -> str:
        return f"a photo of a {self.source.identity.cls}"


def edits(count: int) -> list[Edit]:
    """The first `count` held-out subjects, each with the next one of its class."""
    found = effect_hiper.cases(count + CLASSES)  # classes come in turn
    return [Edit(one, other) for one, other in zip(found[:count], found[CLASSES:], strict=True)]


class Bench(effect_siso.Bench):
    """The small world's models and measures, and the pack's own inversion and optimisation on them."""

    def levels(self, settings: Settings) -> Any:
        """What is sampled of the schedule."""
        import comfy.samplers

        sampling = self.world.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "simple", settings.steps)[settings.skipped :]

    def inverted(self, edit: Edit, settings: Settings) -> Any:
        """The noise of the source."""
        import torch

        from ..core.inversion.host.renoise import renoised
        from ..core.inversion.renoise import ReNoiseSettings

        with torch.inference_mode():
            latent = {"samples": self.world.vae.encode(self.picture(edit.source))}
            prompt = self.conditioning(edit.prompt)
            return renoised(self.world.model, prompt, latent, None, None, self.levels(settings), ReNoiseSettings())

    def mask(self, edit: Edit) -> Any:
        """Ones and zeros [1, 96, 96] on the source's subject."""
        import torch

        with torch.inference_mode():
            return (self.judge.mask(self.picture(edit.source).movedim(-1, 1)) > 0.5).float()

    def edited(self, edit: Edit, start: Any, share: float, settings: Settings) -> Any:
        """The optimisation, with this share of the term's weight."""
        import torch

        from ..core.siso.host.background import Background
        from ..core.siso.host.optimize_lora import Generator, Plan, Sampling, SisoJob, optimize_lora
        from ..core.siso.siso import SisoSettings

        keep = Background(self.picture(edit.source), self.mask(edit), share * settings.weight) if share else None
        samples, levels = start.latent["samples"], start.replay.sigmas
        with torch.inference_mode():
            return optimise_lora(
                Generator(self.world.model, self.vae, self.conditioning(edit.prompt)),
                self.similarity(edit.wanted, effect_siso.FULL),
                Sampling(samples, levels, edit.source.seed, 1.0, settings.grad_steps, start.replay),
                Plan(settings.iterations, settings.rank),
                SisoSettings(settings.learning_rate, settings.weight_decay, patience=settings.patience),
                keep,
            )

    def judged(self, edit: Edit, picture: Any) -> dict[str, float]:
        """All scores of a picture [1, 96, 96, 3]."""
        import torch

        from ..core.vision.host.vision import embed
        from ..core.vision.measures import cosine

        with torch.inference_mode():
            outside = 1 - self.mask(edit)
            error = (picture - self.picture(edit.source)).square().mean(-1)
            seen = embed(self.looks["dino"], torch.cat([self.picture(edit.wanted), picture]))
            return {
                "background": float((outside * error).sum() / outside.sum()),
                "identity": self.identity(edit.wanted, picture.movedim(-1, 1)),
                "dino": float(cosine(seen[1:], seen[:1])),
            }

    def row(self, edit: Edit, settings: Settings) -> dict[str, Any]:
        """All figures of one case."""
        start = self.inverted(edit, settings)
        found: dict[str, Any] = {}
        for kind, share in KINDS.items():
            made = self.edited(edit, start, share, settings)
            found.setdefault("inverted", {**self.judged(edit, made.pictures[:1]), "missed": start.error})
            best = self.judged(edit, made.pictures[made.best : made.best + 1])
            found[kind] = {**best, "iterations": len(made.losses), "best": made.best + 1}
        return found


def stored(chosen: list[Edit], path: Path | None, row_of: Any) -> list[dict[str, Any]]:
    """One row for each case; each is stored as soon as it is there, and taken from there later."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for edit in chosen[len(rows) :]:
        words = [" ".join(word for word in vars(case.identity).values() if word) for case in (edit.source, edit.wanted)]
        rows.append({"subject": " -> ".join(words), **row_of(edit)})
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        parts = {kind: part for kind, part in rows[-1].items() if kind != "subject"}
        shown = {kind: " ".join(f"{value:.4f}" for value in part.values()) for kind, part in parts.items()}
        sys.stdout.write(f"{len(rows):3d} {rows[-1]['subject']}: {shown}\n")
        sys.stdout.flush()
    return rows[: len(chosen)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, the ratio of the background's errors with its interval, paired gains of identity over the inverted
    picture, and the gate."""
    from ..core.vision.measures import paired_interval

    kept, free = KINDS
    kinds = [name for name in rows[0] if name != "subject"]
    mean = {kind: {s: sum(row[kind][s] for row in rows) / len(rows) for s in rows[0][kind]} for kind in kinds}
    ratios = paired_interval([row[kept]["background"] / row[free]["background"] for row in rows])
    lower = sum(row[kept]["background"] < row[free]["background"] for row in rows) / len(rows)
    gains = {
        kind: vars(paired_interval([row[kind]["identity"] - row["inverted"]["identity"] for row in rows]))
        for kind in KINDS
    }
    return {
        "cases": len(rows),
        "mean": mean,
        "ratio of the background's errors": {"mean": ratios.mean, "low": ratios.low, "high": ratios.high},
        "share of cases with a lower one": lower,
        "identity minus inverted": gains,
        "gates held": lower >= SHARE_GATE,
    }


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.edit_siso")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each case's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--runs", type=Path, help="keep finished optimisations here, and take them from here")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    base = hosting.start(options.threads)
    hosting.keep_runs(options.runs)
    bench = Bench(base)
    rows = stored(edits(options.cases), options.rows, lambda edit: bench.row(edit, settings))
    result = summary(rows)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    write(options.out, {"settings": asdict(settings), "summary": result, "rows": rows})
    return int(not result["gates held"])
