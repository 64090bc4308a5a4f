"""Does the background term of SISO's editing keep the background? On toyworld, counted.

For each held-out subject one image is rendered and inverted by the pack's own ReNoise, with the prompt "a photo of a
<class>". From there a LoRA is optimised against the likeness to another held-out subject of that class, with the
background term (weight 10, the judge's mask of the source) and without.

- Background: mean squared error to the source image outside of that mask, of the best image.
- Identity: the measuring encoder's cosine between the judge's subject crops on white, to the other subject.
- DINO: the cosine of whole images that is in the loss.
- Shape: IoU of the judge's masks of the edit and of the other subject's image, each cropped to the mask.

    python toolbox/_load.py benchmarks.edit_siso --rows ROWS.jsonl --out benchmarks/results/edit_siso.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.inversion.renoise import ReNoiseSettings
from ..core.siso.siso import SisoSettings
from ..core.vision.measures import cosine
from ..toyworld.judge import subject_crop
from . import effect_siso, frame, subjects
from .subjects import Exchange

CLASSES, SHARE_GATE = 8, 0.80
KEPT, FREE = "with the term", "without it"


@dataclass(frozen=True)
class Settings:
    """SISO's editing on SDXL-turbo; the rate is toyworld's own, and its steps are more, as it is no turbo model.

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


WORLDS = {"unet": Settings(), "turbo": Settings(steps=4, skipped=1)}  # of SDXL-turbo's four steps, three are taken


def edits(count: int, harder: bool = False) -> list[Exchange]:
    """The first `count` held-out subjects, each with the next one of its class."""
    found = subjects.cases(count + CLASSES, harder)  # classes come in turn
    return [Exchange(one, other) for one, other in zip(found[:count], found[CLASSES:], strict=True)]


class Bench(effect_siso.Bench):
    """The pack's own inversion and optimisation on toyworld."""

    @torch.inference_mode()
    def inverted(self, edit: Exchange) -> Any:
        """The noise of the source."""
        from ..core.inversion.host.renoise import renoise_image
        from ..core.session.images import ImageSource

        latent = {"samples": self.world.vae.encode(self.image(edit.source))}
        levels = self.sigmas(self.settings.steps, "simple")[self.settings.skipped :]
        prompt = self.conditioning(edit.source.class_prompt())
        return renoise_image(self.world.model, prompt, ImageSource(latent), levels, ReNoiseSettings())

    @torch.inference_mode()
    def edited(self, edit: Exchange, start: Any, weight: float) -> Any:
        """The optimisation, with this weight of the term."""
        from ..core.siso.host.background import Background
        from ..core.siso.host.optimize_lora import Generator, Sampling, SisoJob, SisoPlan, optimize_lora

        how, source = self.settings, self.image(edit.source)
        keep = Background(source, self.mask(source.movedim(-1, 1)), weight) if weight else None
        samples, levels = start.latent["samples"], start.replay.sigmas
        job = SisoJob(
            Generator(self.world.model, self.vae, self.conditioning(edit.source.class_prompt())),
            self.similarity(edit.wanted, effect_siso.FULL),
            Sampling(samples, levels, edit.seed, 1.0, how.grad_steps, start.replay),
            SisoPlan(how.iterations, how.rank),
            SisoSettings(how.learning_rate, how.weight_decay, patience=how.patience),
            keep,
        )
        return optimize_lora(job)

    @torch.inference_mode()
    def scores(self, edit: Exchange, image: Any) -> dict[str, float]:
        """All scores of an image [1, 96, 96, 3]."""
        from ..core.vision.host.vision import embed

        source = self.image(edit.source)
        outside = 1 - self.mask(source.movedim(-1, 1))
        error = (image - source).square().mean(-1)
        both = torch.cat([self.image(edit.wanted), image])
        seen = embed(self.encoders["dino"], both)
        masks = self.mask(both.movedim(-1, 1))
        one, other = subject_crop(torch.zeros_like(both.movedim(-1, 1)), masks, subjects.SIDE)[:, 0] < 0.5
        return {
            "background": float((outside * error).sum() / outside.sum()),
            "identity": self.identity(edit.wanted, image.movedim(-1, 1)),
            "dino": float(cosine(seen[1:], seen[:1])),
            "shape": float((one & other).sum() / (one | other).sum()),
        }

    def row_of(self, edit: Exchange) -> dict[str, Any]:
        """All figures of one case."""
        start = self.inverted(edit)
        found: dict[str, Any] = {}
        for kind, weight in {KEPT: self.settings.weight, FREE: 0.0}.items():
            made = self.edited(edit, start, weight)
            found.setdefault("inverted", {**self.scores(edit, made.images[:1]), "missed": start.error})
            best = self.scores(edit, made.images[made.best : made.best + 1])
            found[kind] = {**best, "iterations": len(made.losses), "best": made.best + 1}
        return found


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means, the ratio of the background's errors with its interval, paired gains of identity over the inverted
    image, and the gate."""
    ratios = frame.interval(row[KEPT]["background"] / row[FREE]["background"] for row in rows)
    lower = frame.mean(row[KEPT]["background"] < row[FREE]["background"] for row in rows)
    gains = {
        f"{score} minus inverted": {kind: frame.gain(rows, kind, "inverted", score) for kind in (KEPT, FREE)}
        for score in ("identity", "shape")
        if score in rows[0]["inverted"]
    }
    return {
        "cases": len(rows),
        "mean": frame.means(rows),
        "ratio of the background's errors": {name: ratios[name] for name in ("mean", "low", "high")},
        "share of cases with a lower one": lower,
        **gains,
        "gates held": lower >= SHARE_GATE,
    }


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    run = frame.Run("edit_siso", arguments, WORLDS, cases=16)
    rows = run.rows(run.chosen(edits), lambda: Bench(run.base, run.settings, run.world), Bench.row_of)
    return run.judged(rows, summary(rows))
