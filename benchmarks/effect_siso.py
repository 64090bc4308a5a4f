"""Does SISO's LoRA bring the one subject into the picture, and does the picture still obey the prompt? On the small
world, counted.

For each held-out subject one picture is rendered, and a LoRA is optimised with the pack's own code against the likeness
of the generated picture, from one noise and a plain prompt, "a photo of a <class> on a white background", in few steps.
Then the LoRA is reused in another place, "a photo of a <class> in the snow", with more steps: from the same noise, as
the authors' script does it, and from four others.

The loss looks with the small world's two vision models, DINO (in the place of DINOv2) and CLIP (in the place of the
retrieval model, which has no small form): at the whole generated picture, and at the subject's picture cut out on white
by the judge's mask, since this DINO knows nothing else.

- Identity: the measuring encoder's cosine between the judge's subject crops on white; that encoder is in no loss.
- DINO, CLIP: the cosines that are in the loss, beside it.
- Text: the scorer's cosine with the prompt. The scorer is the CLIP of the loss; the arm with DINO alone is free of it.
- Obeyed: the judge sees the class and the place.

The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.effect_siso --rows ROWS.jsonl --out benchmarks/results/effect_siso.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting
from .effect_sine import write

SAMPLES, SAMPLING_STEPS, CFG, SIDE = 4, 10, 4.5, 96
WON_GATE, TEXT_GATE = 0.80, 0.10
STUDIO = "studio"
WORDS = ("arm", "subject")
SCORES = ("identity", "dino", "clip", "text", "obeyed")


@dataclass(frozen=True)
class Settings:
    """SISO's recipe for a model of many steps (Sana's), with the small world's own rate and few steps in training.

    steps: of the sampling in training.
    """

    iterations: int = 50
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    rank: int = 4
    steps: int = 5
    grad_steps: int = 3
    patience: int = 5


@dataclass(frozen=True)
class Arm:
    """A way of training: how much each vision model counts, and whether the prompt is the bare one."""

    name: str
    dino: float = 1.0
    clip: float = 1.0
    simple: bool = True


FULL = Arm("both features")
ARMS = (FULL, Arm("DINO only", clip=0.0), Arm("CLIP only", dino=0.0), Arm("no prompt simplification", simple=False))


class HostedVAE:
    """The narrow autoencoder with what the pack asks of ComfyUI's VAE to decode with a gradient."""

    def __init__(self, narrow: Any) -> None:
        import comfy.model_patcher
        import torch

        from ..toyworld.widen import SD15_LATENT_SCALE

        class Decoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = narrow.decoder

            def decode(self, samples: Any) -> Any:
                return 2 * self.decoder(samples * (narrow.scale * SD15_LATENT_SCALE) + narrow.shift) - 1

        self.device, self.vae_dtype = torch.device("cpu"), torch.float32
        self.first_stage_model = Decoder()
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, self.device)
        self.encode = narrow.encode

    def spacial_compression_decode(self) -> int:
        """Pixels of a latent's side."""
        return 8

    def memory_used_decode(self, shape: tuple[int, ...], dtype: Any) -> float:
        """Bytes of one decoding; not much."""
        return 2.0**24


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own optimisation on them."""

    def __init__(self, base: Path) -> None:
        import torch

        from ..core.vision.host.vision import load_vision
        from ..toyworld.vision_models import FOLDERS, build_vision_folders

        super().__init__()
        folders = build_vision_folders(base / "vision")
        with torch.inference_mode():
            self.looks = {name: load_vision(folders[FOLDERS[name]]) for name in ("dino", "clip")}
        self.vae = HostedVAE(self.world.vae)

    def sigmas(self, steps: int) -> Any:
        """The levels of a sampling."""
        import comfy.samplers

        sampling = self.world.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps)

    def similarity(self, case: effect_hiper.Case, arm: Arm) -> Any:
        """What the loss compares with."""
        import torch

        from ..core.siso.host.similarity import Similarity, part_of

        weights, picture = {"dino": arm.dino, "clip": arm.clip}, self.picture(case)
        with torch.inference_mode():
            mask = (self.judge.mask(picture.movedim(-1, 1)) > 0.5).float()
            used = [(self.looks[name], weight) for name, weight in weights.items() if weight]
            return Similarity(tuple(part_of(vision, weight, picture, mask) for vision, weight in used))

    def optimised(self, case: effect_hiper.Case, arm: Arm, settings: Settings) -> Any:
        """The LoRA and the pictures on the way."""
        import torch

        from ..core.siso.host.optimize_lora import Generator, Plan, Sampling, SisoJob, optimize_lora
        from ..core.siso.siso import SisoSettings

        prompt = prompt_of(case, not arm.simple)
        generator = Generator(self.world.model, self.vae, self.conditioning(prompt), self.conditioning(""))
        latent = torch.zeros(1, 4, SIDE // 8, SIDE // 8)
        with torch.inference_mode():
            return optimise_lora(
                generator,
                self.similarity(case, arm),
                Sampling(latent, self.sigmas(settings.steps), case.seed, CFG, settings.grad_steps),
                Plan(settings.iterations, settings.rank),
                SisoSettings(settings.learning_rate, settings.weight_decay, patience=settings.patience),
            )

    def reused(self, case: effect_hiper.Case, lora: dict | None, others: bool) -> Any:
        """Pictures [N, 3, 96, 96] of the subject's class in the other place, by stock loader and sampler: one from the
        noise of the training, or some from others."""
        import comfy.sample
        import comfy.sd
        import torch

        with torch.inference_mode():
            model = self.world.model
            if lora is not None:
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
            shape = (SAMPLES if others else 1, 4, SIDE // 8, SIDE // 8)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + others))
            latents = comfy.sample.sample(
                model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform",
                self.conditioning(prompt_of(case, True)), self.conditioning(""), torch.zeros(shape),
                disable_pbar=True, seed=case.seed,
            )  # fmt: skip
            return self.world.vae.decode(latents).movedim(-1, 1)

    def scored(self, case: effect_hiper.Case, pictures: Any, placed: bool) -> dict[str, float]:
        """All scores of pictures [N, 3, 96, 96], each a mean. placed: whether the prompt named the other place."""
        import torch

        from ..core.vision.host.vision import embed
        from ..core.vision.measures import cosine
        from ..toyworld import world

        with torch.inference_mode():
            found = {"identity": self.identity(case, pictures)}
            for name, part in zip(self.looks, self.similarity(case, FULL).parts, strict=True):
                wanted, seen = (embed(part.vision, each) for each in (part.references, pictures.movedim(1, -1)))
                found[name] = float(cosine(seen, wanted).mean())
            found["text"] = self.text(prompt_of(case, placed), pictures)
            judged = self.judge.attributes(pictures)
            obeyed = judged["class"] == world.CLASSES.index(case.identity.cls)
            place = case.target_place if placed else STUDIO
            obeyed &= judged["background"] == list(world.BACKGROUNDS).index(place)
            return {**found, "obeyed": float(obeyed.float().mean())}

    def row(self, case: effect_hiper.Case, arm: Arm, settings: Settings) -> dict[str, Any]:
        """All figures of one subject and arm: of the training's picture before and after, and of those of the other
        prompt without and with the LoRA."""
        optimised = self.optimised(case, arm, settings)
        placed, pictures = not arm.simple, optimised.pictures.movedim(-1, 1)
        best = self.scored(case, pictures[optimised.best : optimised.best + 1], placed)
        found = {
            "base": self.scored(case, pictures[:1], placed),
            "optimised": {**best, "iterations": len(optimised.losses), "best": optimised.best + 1},
        }
        for name, others in {"": False, ", other noise": True}.items():
            found[f"base, other prompt{name}"] = self.scored(case, self.reused(case, None, others), True)
            found[f"reused{name}"] = self.scored(case, self.reused(case, optimised.lora, others), True)
        return found


def prompt_of(case: effect_hiper.Case, placed: bool) -> str:
    """The bare prompt, or the one that names another place too."""
    from ..toyworld import world

    place = case.target_place if placed else STUDIO
    return f"a photo of a {case.identity.cls} {world.BACKGROUNDS[place]}"


def stored(pairs: list[tuple[Arm, effect_hiper.Case]], path: Path | None, row_of: Any) -> list[dict[str, Any]]:
    """One row for each arm and subject; each is stored as soon as it is there, and taken from there later."""
    known = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    found = {(row["arm"], row["subject"]): row for row in known}
    rows = []
    for arm, case in pairs:
        subject = " ".join(word for word in vars(case.identity).values() if word)
        row: dict[str, Any] = found.get((arm.name, subject)) or {}
        row = row or {"arm": arm.name, "subject": subject, **row_of(case, arm)}
        rows.append(row)
        if (arm.name, subject) in found:
            continue
        if path:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        shown = {name: " ".join(f"{v:.2f}" for v in row[name].values()) for name in row if name not in WORDS}
        sys.stdout.write(f"{len(rows):3d} {arm.name}, {subject}: {shown}\n")
        sys.stdout.flush()
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of one arm, and its paired gains over the base."""
    from ..core.vision.measures import paired_interval

    def gain(kind: str, base: str, score: str) -> dict[str, Any]:
        return vars(paired_interval([row[kind][score] - row[base][score] for row in rows]))

    kinds = [name for name in rows[0] if name not in WORDS]
    pairs = {"optimised": "base", "reused": "base, other prompt"}
    pairs["reused, other noise"] = "base, other prompt, other noise"
    return {
        "subjects": len(rows),
        "mean": {kind: {s: sum(row[kind][s] for row in rows) / len(rows) for s in rows[0][kind]} for kind in kinds},
        "minus base": {kind: {s: gain(kind, base, s) for s in SCORES} for kind, base in pairs.items()},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of every arm that has rows, those of the full method also over the others' subjects alone, and what
    the gates ask of it."""
    by_arm = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in ARMS}
    others = {row["subject"] for row in rows if row["arm"] != FULL.name}
    by_arm[f"{FULL.name}, the ablations' subjects"] = [row for row in by_arm[FULL.name] if row["subject"] in others]
    found = {name: figures(some) for name, some in by_arm.items() if len(some) > 1}
    full = found[FULL.name]
    mean, gain = full["mean"], full["minus base"]
    identity = gain["optimised"]["identity"]
    pairs = {"optimised": "base", "reused": "base, other prompt"}
    lost = {kind: 1 - mean[kind]["text"] / mean[base]["text"] for kind, base in pairs.items()}
    gates = {
        "identity rises": identity["low"] > 0 and identity["share_won"] >= WON_GATE,
        "text falls by less than a tenth": lost["optimised"] < TEXT_GATE,
        "identity above the base when reused": gain["reused"]["identity"]["low"] > 0,
    }
    return {"arms": found, "text lost": lost, "gates": gates, "gates held": all(gates.values())}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_siso")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="skip so many subjects; others than the table's: 32")
    parser.add_argument("--ablations", type=int, default=16, help="subjects of the other ways of training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each subject's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--runs", type=Path, help="keep finished optimisations here, and take them from here")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    base = hosting.start(options.threads)
    hosting.keep_runs(options.runs)
    bench = Bench(base)
    cases = effect_hiper.cases(options.first + options.subjects)[options.first :]
    pairs = [(FULL, case) for case in cases]
    pairs += [(arm, case) for case in cases[: options.ablations] for arm in ARMS if arm is not FULL]
    rows = stored(pairs, options.rows, lambda case, arm: bench.row(case, arm, settings))
    result = summary(rows)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    shared = {"cfg": CFG, "samples": SAMPLES, "sampling_steps": SAMPLING_STEPS}
    write(options.out, {"settings": {**asdict(settings), **shared}, "summary": result, "rows": rows})
    return int(not result["gates held"])
