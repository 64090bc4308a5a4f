"""Does personalization guidance show more of the subject than plain guidance, and does the prompt still hold?

On toyworld, counted. For each held-out subject a LoRA is fine-tuned on one image under "a photo of a sks <class>", and
images of "a photo of a sks <class> <another place>" are sampled from the same noise: by the base model, by the
fine-tuned model with plain guidance (omega 1), and with weak models of several omega. 120 updates leave the LoRA
under-trained in toyworld.

- Identity: the measuring encoder's cosine between the judge's subject crops on white and the source image's.
- Text: the scorer's cosine with the class in the new place. Reached: the judge sees that class in that place.

    python toolbox/_load.py benchmarks.effect_personalization --out benchmarks/results/effect_personalization.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import effect_sine, frame

PLAIN = "omega 1"
SCORES = ("identity", "text", "reached")


@dataclass(frozen=True)
class Settings(effect_sine.Settings):
    """As SINE's; omega: the weak models."""

    steps: int = 120
    omega: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)


WORLDS = {"unet": Settings(), "flow": Settings(steps=20, learning_rate=2e-3)}  # the flow transformer learns faster


class Bench(effect_sine.Bench):
    """The pack's own fine-tuning and guidance on toyworld."""

    settings: Settings

    def scored_models(self, edit: effect_sine.Edit) -> dict[str, dict[str, float]]:
        """The scores of the base model and of each omega."""
        from ..core.sine.host.personalization import with_personalization

        base, tuned, case = self.world.model, self.tune(edit), edit.case
        models = {f"omega {omega:g}": with_personalization(base, tuned, omega) for omega in self.settings.omega}
        asked, spoken = (case.class_prompt(case.target_place, word) for word in ("", "sks "))

        def scores(model: Any, prompt: str) -> dict[str, float]:
            images = self.images(model, edit, prompt)
            seen = self.share_seen(images, cls=case.identity.cls, background=case.target_place)
            return {"identity": self.identity(case, images), "text": self.text(asked, images), "reached": seen}

        row = {"base": scores(base, asked), PLAIN: scores(tuned, spoken)}
        return row | {name: scores(model, spoken) for name, model in models.items()}


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means, and paired intervals over plain guidance."""
    kinds = [kind for kind in frame.kinds_of(rows) if kind not in ("base", PLAIN)]
    gains = {kind: {score: frame.gain(rows, kind, PLAIN, score) for score in SCORES} for kind in kinds}
    best = gains["omega 0.75"]
    gates = {
        "more of the subject at omega 0.75": best["identity"]["low"] > 0,
        "text not lower": best["text"]["high"] > 0,
        "place reached as often": best["reached"]["mean"] >= -0.05,
    }
    return frame.gated({"subjects": len(rows), "mean": frame.means(rows), "over plain guidance": gains}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    run = frame.Run("effect_personalization", arguments, WORLDS, subjects=16)
    rows = run.rows(run.chosen(effect_sine.edits), lambda: Bench(run.settings, run.world), Bench.scored_models)
    return run.judged(rows, summary(rows))
