"""HiFi Tuner's ablation (its Table 2) on toyworld: what each part adds to identity, and what it costs in text.

Each held-out subject is rendered four times in one place, as an owner would photograph it. Learned embeddings (TI)
and fine-tuned copies of the model (DB) then show it in another place, from the same noise in every row:

- base: 5 tokens from the empty prompt, no mask, no second term; + mask; + regularisation (eq. 6 whole); + step-wise
  (Algorithm 1); + reference (Algorithms 2 and 4);
- DB base: all weights tuned on the same images; DB + reference.

Identity is the measuring encoder's mean cosine between the judge's subject crops of an image and of the four sources;
text the scorer's cosine with the prompt, which names class and place only. The reference is chosen by the other
encoder, masks are the judge's.

    python toolbox/_load.py benchmarks.table2_hifi --out benchmarks/results/table2_hifi.json
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from ..core.denoiser import latent_mask
from ..core.embedding.hifi_tuner import StepWiseSettings
from ..core.embedding.hiper import HiPerSettings
from ..core.embedding.presets import EMPTY
from ..core.prompt.conditioning import apply_embedding
from ..core.reference.alignment import align, warp
from ..core.reference.guidance import END_PERCENT, START_PERCENT, ReferenceSettings
from ..core.sine.fine_tune import FineTuneSettings
from ..toyworld.vision_models import features, load_model
from . import frame, subjects
from .subjects import SIDE, Case

SOURCES, SMALLEST = 4, 64
TI = ("base", "+ mask", "+ regularisation", "+ step-wise", "+ reference")
DB = ("DB base", "DB + reference")
PAPER = {  # DINO and CLIP-T of Table 2
    "base": (0.567, 0.293),
    "+ mask": (0.606, 0.292),
    "+ regularisation": (0.612, 0.294),
    "+ step-wise": (0.626, 0.292),
    "+ reference": (0.665, 0.291),
    "DB base": (0.662, 0.315),
    "DB + reference": (0.680, 0.317),
}


@dataclass(frozen=True)
class Settings:
    """What was found on subjects outside of the table; the published values if they are known."""

    steps: int = 1000
    learning_rate: float = 5e-3
    tokens: int = 5
    anchor_weight: float = 0.01
    start_percent: float = 0.0
    end_percent: float = 1.0
    inner_steps: int = 10
    inner_rate: float = 5e-3
    scale: float = 1.0
    tuning_steps: int = 400
    tuning_rate: float = 1e-3
    cfg: float = 4.0
    samples: int = 4
    sampling_steps: int = 50


class Bench(subjects.Bench):
    """The pack's own code on toyworld."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings, self.chooser = settings, load_model("dino")
        self.empty, self.levels = self.conditioning(""), self.sigmas(settings.sampling_steps)

    def sources(self, case: Case) -> Any:
        """The four images of the subject [4, 96, 96, 3]."""
        return subjects.rendered(case.identity, case.source_place, *(10 * case.seed + i for i in range(SOURCES)))

    def subject(self, case: Case, masked: bool) -> Any:
        """The sources as latents, with or without the judge's masks."""
        from ..core.session.images import TrainingImages

        images = self.sources(case)
        mask = latent_mask(self.mask(images.movedim(-1, 1)), SIDE // 8, SIDE // 8) if masked else None
        return TrainingImages(self.world.vae.encode(images), mask)

    def embedding(self, case: Case, masked: bool, weight: float) -> Any:
        """Eq. 6, or a part of it."""
        from ..core.embedding.host.train import Schedule, TrainingPrompts, train_embedding

        how = self.settings
        return train_embedding(
            self.world.model,
            self.conditioning(case.class_prompt()),
            self.subject(case, masked),
            HiPerSettings(how.tokens, how.learning_rate, case.seed),
            Schedule(how.steps, how.steps, how.start_percent, how.end_percent),
            TrainingPrompts(self.empty, weight, init=EMPTY),
        )[0]

    def refined(self, case: Case, embedding: Any) -> Any:
        """Algorithm 1."""
        from ..core.embedding.host.refine import refine_embedding
        from ..core.embedding.host.train import RegularizerOptions

        how = self.settings
        return refine_embedding(
            self.world.model,
            self.conditioning(case.class_prompt()),
            self.subject(case, True),
            embedding,
            self.levels,
            StepWiseSettings(how.inner_steps, how.inner_rate, case.seed),
            RegularizerOptions(self.empty, how.anchor_weight),
        )[0]

    def tuned(self, case: Case) -> Any:
        """A copy of the model with all weights tuned on the sources."""
        from ..core.sine.host.crops import CropSettings
        from ..core.sine.host.fine_tune import FULL, FineTuneData, FineTunePlan, fine_tune

        prompt = case.class_prompt(word="sks ")
        return fine_tune(
            self.world.model,
            self.world.vae,
            FineTuneData(self.sources(case), prompt, positive=self.conditioning(prompt)),
            FineTunePlan(CropSettings(SIDE), FULL, self.settings.tuning_steps),
            FineTuneSettings(self.settings.tuning_rate, case.seed),
        )[0]

    def images(self, case: Case, model: Any, positive: list) -> Any:
        """Images [4, 3, 96, 96] of a prompt, from the same noise for every row."""
        return self.sampled(model, positive, case.seed, self.settings)

    def chosen(self, case: Case, image: Any) -> int:
        """Which of the sources resembles an image [1, 3, 96, 96] most, whole."""
        both = torch.cat([image, self.sources(case).movedim(-1, 1)])
        found = F.normalize(features(self.chooser, both), dim=1)
        return int((found[1:] @ found[0]).argmax())

    def guided(self, case: Case, model: Any, positive: list, images: Any) -> Any:
        """Algorithm 2 for each of the images, from its own noise; one without a subject to align with stays."""
        from ..core.inversion.host.ddim import invert_image
        from ..core.reference.host.alignment import MAX_DEGREES
        from ..core.reference.host.guidance import sample_with_reference
        from ..core.session.images import ImageSource
        from ..core.session.session import gradients

        caption = self.conditioning(case.class_prompt(case.source_place))
        sources, found = self.sources(case).movedim(-1, 1), []
        for image, noise in zip(images.split(1), self.noise(case.seed, len(images)).split(1), strict=True):
            reference = sources[self.chosen(case, image)][None]
            ours, wanted = self.mask(reference)[0], self.mask(image)[0]
            if min(float(ours.sum()), float(wanted.sum())) < SMALLEST:
                found.append(image)
                continue
            with gradients():
                matrix = align(ours.clone(), wanted.clone(), max_degrees=MAX_DEGREES).matrix
            moved = warp(reference, matrix, (SIDE, SIDE)).movedim(1, -1)
            mask = (warp(ours[None, None], matrix, (SIDE, SIDE), "zeros")[0] > 0.5).float()
            source = ImageSource(None, moved, self.world.vae)
            trajectory = invert_image(model, caption, source, self.levels, "published", 0)
            given = SimpleNamespace(generate_noise=lambda _latent, noise=noise: noise)  # a NOISE that is there already
            moved_image, how = (trajectory, mask, (START_PERCENT, END_PERCENT)), ReferenceSettings(self.settings.cfg)
            samples, *_ = sample_with_reference(model, positive, self.empty, given, *moved_image, how)
            found.append(self.decoded(samples))
        return torch.cat(found)

    def scored(self, case: Case, images: Any) -> dict[str, float]:
        """Both scores, and how often the judge sees class and place."""
        found = self.looks(torch.cat([self.sources(case).movedim(-1, 1), images]))
        return {
            "identity": float((found[SOURCES:] @ found[:SOURCES].T).mean()),
            "text": self.text(case.class_prompt(case.target_place), images),
            "class": self.share_seen(images, cls=case.identity.cls),
            "background": self.share_seen(images, background=case.target_place),
        }

    @torch.inference_mode()
    def row(self, case: Case) -> dict[str, Any]:
        """All scores of one subject."""
        base, weight = self.world.model, self.settings.anchor_weight
        target = self.conditioning(case.class_prompt(case.target_place))
        seeds = (10 * case.seed + SOURCES + i for i in range(self.settings.samples))
        real = subjects.rendered(case.identity, case.target_place, *seeds).movedim(-1, 1)
        how = {"base": (False, 0.0), "+ mask": (True, 0.0), "+ regularisation": (True, weight)}
        found = {name: self.embedding(case, *each) for name, each in how.items()}
        found["+ step-wise"] = self.refined(case, found["+ regularisation"])
        row = {
            "prompt alone": self.scored(case, self.images(case, base, target)),
            "real renders": self.scored(case, real),
        }
        for name, embedding in found.items():
            positive = apply_embedding(target, embedding.at(0), self.settings.scale, embedding.windows)
            images = self.images(case, base, positive)
            row[name] = self.scored(case, images)
        row["+ reference"] = self.scored(case, self.guided(case, base, positive, images))
        tuned, positive = self.tuned(case), self.conditioning(case.class_prompt(case.target_place, "sks "))
        images = self.images(case, tuned, positive)
        row["DB base"] = self.scored(case, images)
        row["DB + reference"] = self.scored(case, self.guided(case, tuned, positive, images))
        return row


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means of every row of the table, what each adds to the one before (paired, 95 %), and what is asked of it."""
    mean = frame.means(rows)
    steps = [*zip(TI[1:], TI[:-1], strict=True), (TI[-1], TI[0]), (DB[1], DB[0])]
    gains = {f"{a} - {b}": {s: frame.gain(rows, a, b, s) for s in ("identity", "text")} for a, b in steps}
    gates = {
        "identity rises from first to last": gains[f"{TI[-1]} - {TI[0]}"]["identity"]["low"] > 0,
        "each part raises identity": all(mean[name]["identity"] > mean[other]["identity"] for name, other in steps),
        "text does not fall by more than noise": all(each["text"]["high"] >= 0 for each in gains.values()),
    }
    return frame.gated({"subjects": len(rows), "mean": mean, "gains": gains, "paper": PAPER}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the table; exit 1 when something that is asked does not hold."""
    run = frame.Run("table2_hifi", arguments, Settings(), subjects=16)
    rows = run.rows(run.chosen(subjects.cases), lambda: Bench(run.settings), Bench.row)
    return run.judged(rows, summary(rows))
