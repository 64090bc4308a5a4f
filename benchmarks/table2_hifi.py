"""HiFi Tuner's ablation (its Table 2) on the small world: what each part adds to identity, and what it costs in text.

Each held-out subject is rendered four times in one place, as an owner would photograph it. Learned embeddings (TI)
and fine-tuned copies of the model (DB) then show it in another place, from the same noise in every row:

- base: 5 rows from the empty prompt, no mask, no second term; + mask; + regularisation (eq. 6 whole); + step-wise
  (Algorithm 1); + reference (Algorithms 2 and 4);
- DB base: all weights tuned on the same pictures; DB + reference.

Identity is the measuring encoder's mean cosine between the judge's subject crops of a picture and of the four sources;
text the scorer's cosine with the prompt, which names class and place only. The reference is chosen by the other
encoder, masks are the judge's. The narrow form of the small world is used.

    python toolbox/_load.py benchmarks.table2_hifi --out benchmarks/results/table2_hifi.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting

SAMPLES, SAMPLING_STEPS, CFG, SIDE, SOURCES = 4, 50, 4.0, 96, 4
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
    """What was found on subjects outside of the table; the published values where they are known."""

    steps: int = 1000
    learning_rate: float = 5e-3
    tokens: int = 5
    anchor_weight: float = 0.01
    inner_steps: int = 10
    scale: float = 1.0
    tuning_steps: int = 400
    tuning_rate: float = 1e-3


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own code on them."""

    def __init__(self) -> None:
        from ..toyworld.vision_models import load_model

        super().__init__()
        self.chooser = load_model("dino")

    def sources(self, case: effect_hiper.Case) -> Any:
        """The four pictures of the subject [4, 96, 96, 3]."""
        import numpy as np
        import torch

        from ..toyworld import world

        renders = [world.render(case.identity, case.source_place, 10 * case.seed + i)[0] for i in range(SOURCES)]
        return torch.from_numpy(np.stack(renders)).float() / 255

    def subject(self, case: effect_hiper.Case, masked: bool) -> Any:
        """The sources as latents, with or without the judge's masks."""
        from ..core.denoiser import latent_mask
        from ..core.session.images import TrainingImages

        pictures = self.sources(case)
        mask = latent_mask(self.masks(pictures.movedim(-1, 1)), SIDE // 8, SIDE // 8) if masked else None
        return TrainingImages(self.world.vae.encode(pictures), mask)

    def masks(self, pictures: Any) -> Any:
        """Ones and zeros [B, 96, 96] of pictures [B, 3, 96, 96]."""
        return (self.judge.mask(pictures) > 0.5).float()

    def prompts(self, case: effect_hiper.Case, word: str = "") -> tuple[list, list]:
        """What it was trained with, and what is asked for: class and place only."""
        from ..toyworld import world

        of_class = f"a photo of a {word}{case.identity.cls}"
        return self.conditioning(of_class), self.conditioning(f"{of_class} {world.BACKGROUNDS[case.target_place]}")

    def embedding(self, case: effect_hiper.Case, settings: Settings, masked: bool, weight: float) -> Any:
        """Eq. 6, or a part of it."""
        from ..core.embedding.hiper import HiPerSettings
        from ..core.embedding.host.train import Hold, Schedule, train_embedding

        empty = self.conditioning("")
        return train_embedding(
            self.world.model,
            self.prompts(case)[0],
            self.subject(case, masked),
            HiPerSettings(settings.tokens, settings.learning_rate, case.seed),
            Schedule(settings.steps, settings.steps),
            empty=empty,
            hold=Hold(empty, weight) if weight else None,
        )[0]

    def refined(self, case: effect_hiper.Case, embedding: Any, settings: Settings) -> Any:
        """Algorithm 1."""
        from ..core.embedding.hifi_tuner import StepWiseSettings
        from ..core.embedding.host.refine import refine_embedding
        from ..core.embedding.host.train import Hold

        return refine_embedding(
            self.world.model,
            self.prompts(case)[0],
            self.subject(case, True),
            embedding,
            0,
            self.sigmas(),
            StepWiseSettings(settings.inner_steps, settings.learning_rate, case.seed),
            Hold(self.conditioning(""), settings.anchor_weight),
        )[0]

    def sigmas(self) -> Any:
        """The levels of the sampling."""
        import comfy.samplers

        sampling = self.world.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", SAMPLING_STEPS)

    def tuned(self, case: effect_hiper.Case, settings: Settings) -> Any:
        """A copy of the model with all weights tuned on the sources."""
        from ..core.sine.fine_tune import FineTuneSettings
        from ..core.sine.host.crops import Cutting
        from ..core.sine.host.fine_tune import FULL, Plan, fine_tune

        prompt = f"a photo of a sks {case.identity.cls}"
        return fine_tune(
            self.world.model,
            self.world.vae,
            TrainingImages(self.sources(case), prompt, positive=self.conditioning(prompt)),
            Plan(Cutting(SIDE), FULL, settings.tuning_steps),
            FineTuneSettings(settings.tuning_rate, case.seed),
        )[0]

    def noise(self, case: effect_hiper.Case) -> Any:
        """[4, 4, 12, 12], the same for every row."""
        import torch

        shape = (SAMPLES, 4, SIDE // 8, SIDE // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(case.seed))

    def pictures(self, case: effect_hiper.Case, model: Any, positive: list) -> Any:
        """Pictures [4, 3, 96, 96] of a prompt."""
        import comfy.sample
        import torch

        noise = self.noise(case)
        latents = comfy.sample.sample(
            model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform", positive, self.conditioning(""),
            torch.zeros_like(noise), disable_pbar=True, seed=case.seed,
        )  # fmt: skip
        return self.world.vae.decode(latents).movedim(-1, 1)

    def chosen(self, case: effect_hiper.Case, picture: Any) -> int:
        """Which of the sources resembles a picture [1, 3, 96, 96] most, whole."""
        import torch.nn.functional as F

        from ..toyworld.vision_models import features

        both = torch_cat(picture, self.sources(case).movedim(-1, 1))
        found = F.normalize(features(self.chooser, both), dim=1)
        return int((found[1:] @ found[0]).argmax())

    def guided(self, case: effect_hiper.Case, model: Any, positive: list, pictures: Any) -> Any:
        """Algorithm 2 for each of the pictures, from its own noise; one without a subject to align with stays."""
        from ..core.inversion.host.ddim import inverted
        from ..core.reference.alignment import align, warp
        from ..core.reference.guidance import END_PERCENT, START_PERCENT, ReferenceSettings
        from ..core.reference.host.alignment import MAX_DEGREES
        from ..core.reference.host.guidance import guided_by_reference
        from ..core.session.session import gradients
        from ..toyworld import world

        caption = self.conditioning(f"a photo of a {case.identity.cls} {world.BACKGROUNDS[case.source_place]}")
        sources, found = self.sources(case).movedim(-1, 1), []
        for index, picture in enumerate(pictures.split(1)):
            reference = sources[self.chosen(case, picture)][None]
            ours, theirs = self.masks(reference)[0], self.masks(picture)[0]
            if min(float(ours.sum()), float(theirs.sum())) < 64:
                found.append(picture)
                continue
            with gradients():
                matrix = align(ours.clone(), theirs.clone(), max_degrees=MAX_DEGREES).matrix
            moved = warp(reference, matrix, (SIDE, SIDE)).movedim(1, -1)
            mask = (warp(ours[None, None], matrix, (SIDE, SIDE), "zeros")[0] > 0.5).float()
            trajectory = inverted(model, caption, None, moved, self.world.vae, self.sigmas(), "published", 0)
            result = guided_by_reference(
                model, positive, self.conditioning(""), Noise(self.noise(case)[index : index + 1]), trajectory, mask,
                ReferenceSettings(CFG), START_PERCENT, END_PERCENT,
            )  # fmt: skip
            found.append(self.world.vae.decode(result.samples).movedim(-1, 1))
        return torch_cat(*found)

    def real(self, case: effect_hiper.Case) -> Any:
        """Real renders of the subject in the place that is asked for: what the scores could be."""
        import numpy as np
        import torch

        from ..toyworld import world

        seeds = range(10 * case.seed + SOURCES, 10 * case.seed + SOURCES + SAMPLES)
        renders = [world.render(case.identity, case.target_place, seed)[0] for seed in seeds]
        return torch.from_numpy(np.stack(renders)).movedim(-1, 1).float() / 255

    def scored(self, case: effect_hiper.Case, pictures: Any) -> dict[str, float]:
        """Both scores, and how often the judge sees class and place."""
        import torch.nn.functional as F

        from ..toyworld import world
        from ..toyworld.judge import subject_crop
        from ..toyworld.vision_models import features

        both = torch_cat(self.sources(case).movedim(-1, 1), pictures)
        found = F.normalize(features(self.measure, subject_crop(both, self.judge.mask(both), SIDE)), dim=1)
        seen = self.judge.attributes(pictures)
        asked = {"class": list(world.CLASSES).index(case.identity.cls)}
        asked["background"] = list(world.BACKGROUNDS).index(case.target_place)
        prompt = f"a photo of a {case.identity.cls} {world.BACKGROUNDS[case.target_place]}"
        return {
            "identity": float((found[SOURCES:] @ found[:SOURCES].T).mean()),
            "text": self.text(prompt, pictures),
            **{name: float((seen[name] == value).float().mean()) for name, value in asked.items()},
        }


class Noise:
    """A NOISE that is there already."""

    def __init__(self, noise: Any) -> None:
        self.noise = noise

    def generate_noise(self, latent: dict[str, Any]) -> Any:
        """As ComfyUI asks for it."""
        return self.noise


def torch_cat(*parts: Any) -> Any:
    import torch

    return torch.cat(parts)


def row_of(bench: Bench, case: effect_hiper.Case, settings: Settings) -> dict[str, Any]:
    """All scores of one subject."""
    import torch

    from ..core.prompt.conditioning import apply_embedding

    with torch.inference_mode():
        _, target = bench.prompts(case)
        weight = settings.anchor_weight
        found = {
            name: bench.embedding(case, settings, *how)
            for name, how in {"base": (False, 0.0), "+ mask": (True, 0.0), "+ regularisation": (True, weight)}.items()
        }
        found["+ step-wise"] = bench.refined(case, found["+ regularisation"], settings)
        row: dict[str, Any] = {"subject": " ".join(word for word in vars(case.identity).values() if word)}
        row["prompt alone"] = bench.scored(case, bench.pictures(case, bench.world.model, target))
        row["real renders"] = bench.scored(case, bench.real(case))
        for name, embedding in found.items():
            positive = apply_embedding(target, embedding.at(0), settings.scale, embedding.windows)
            pictures = bench.pictures(case, bench.world.model, positive)
            row[name] = bench.scored(case, pictures)
        row["+ reference"] = bench.scored(case, bench.guided(case, bench.world.model, positive, pictures))
        tuned = bench.tuned(case, settings)
        _, of_tuned = bench.prompts(case, "sks ")
        pictures = bench.pictures(case, tuned, of_tuned)
        row["DB base"] = bench.scored(case, pictures)
        row["DB + reference"] = bench.scored(case, bench.guided(case, tuned, of_tuned, pictures))
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of every row of the table, what each adds to the one before (paired, 95 %), and what is asked of it."""
    from ..core.vision.measures import paired_interval

    def gain(name: str, other: str, score: str) -> dict[str, Any]:
        return vars(paired_interval([row[name][score] - row[other][score] for row in rows]))

    names = [name for name in rows[0] if name != "subject"]
    scores = ("identity", "text", "class", "background")
    mean = {name: {s: sum(row[name][s] for row in rows) / len(rows) for s in scores} for name in names}
    steps = [*zip(TI[1:], TI[:-1], strict=True), (TI[-1], TI[0]), (DB[1], DB[0])]
    gains = {f"{name} - {other}": {s: gain(name, other, s) for s in scores[:2]} for name, other in steps}
    whole = gains[f"{TI[-1]} - {TI[0]}"]
    gates = {
        "identity rises from first to last": whole["identity"]["low"] > 0,
        "each part raises identity": all(mean[name]["identity"] > mean[other]["identity"] for name, other in steps),
        "text does not fall by more than noise": all(each["text"]["high"] >= 0 for each in gains.values()),
    }
    return {"subjects": len(rows), "mean": mean, "gains": gains, "gates": gates, "paper": PAPER}


def main(arguments: list[str]) -> int:
    """Print and write the table; exit 1 when something that is asked does not hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.table2_hifi")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="skip so many subjects; others than the table's: 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rows", type=Path, help="make the table of a file with finished rows instead")
    parser.add_argument("--runs", type=Path, help="keep finished trainings here, and take them from here")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    rows = json.loads(options.rows.read_text())["rows"] if options.rows else measured(options, settings)
    found = summary(rows)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kept = {"settings": asdict(settings), "rows": rows, "summary": found}
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    return int(not all(found["gates"].values()))


def measured(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """A row for each subject."""
    hosting.start(options.threads)
    if options.runs:
        import folder_paths

        folder_paths.set_user_directory(str(options.runs.resolve()))
    bench, rows = Bench(), []
    for case in effect_hiper.cases(options.first + options.subjects)[options.first :]:
        rows.append(row_of(bench, case, settings))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    return rows
