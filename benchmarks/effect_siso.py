"""Does SISO's LoRA bring the one subject into the picture, and does the picture still obey the prompt? On the small
world, counted.

For each held-out subject one picture is rendered, and a LoRA is optimised with the pack's own code against the likeness
of the generated picture, from one noise and the bare prompt "a photo of a <class>". Then the LoRA is reused: pictures
of the subject in another place, "a photo of a <class> in the snow", are sampled from other noise with and without it.

The loss looks with the small world's two vision models, DINO (in the place of DINOv2) and CLIP (in the place of the
retrieval model, which has no small form), at whole pictures, as published.

- Identity: the measuring encoder's cosine between the judge's subject crops on white; that encoder is in no loss.
- DINO, CLIP: the cosines that are in the loss, beside it.
- Text: the scorer's cosine with the prompt. The scorer is the CLIP of the loss; the arm with DINO alone is free of it.
- Obeyed: the judge sees the class and, where the prompt names a place, the place.

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

SAMPLES, SAMPLING_STEPS, CFG, SIDE = 4, 20, 4.5, 96
WON_GATE, TEXT_GATE = 0.80, 0.10
SCORES = ("identity", "dino", "clip", "text", "obeyed")


@dataclass(frozen=True)
class Settings:
    """SISO's recipe for a model of many steps (Sana's); the rate is the small world's own."""

    iterations: int = 50
    learning_rate: float = 8e-4
    weight_decay: float = 1e-4
    rank: int = 4
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

    def memory_used_decode(self, shape: tuple[int, ...], dtype: Any) -> float:
        """Bytes of one decoding; not much."""
        return 2.0**24


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own optimisation on them."""

    def __init__(self, base: Path) -> None:
        import torch

        from ..core.host.vision import load_vision
        from ..toyworld.vision_models import FOLDERS, build_vision_folders

        super().__init__()
        folders = build_vision_folders(base / "vision")
        with torch.inference_mode():
            self.looks = {name: load_vision(folders[FOLDERS[name]]) for name in ("dino", "clip")}
        self.vae = HostedVAE(self.world.vae)

    def sigmas(self) -> Any:
        """The levels of the sampling."""
        import comfy.samplers

        sampling = self.world.model.get_model_object("model_sampling")
        return comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", SAMPLING_STEPS)

    def similarity(self, case: effect_hiper.Case, arm: Arm) -> Any:
        """What the loss compares with."""
        from ..core.host.similarity import Part, Similarity

        weights = {"dino": arm.dino, "clip": arm.clip}
        picture = self.picture(case)
        return Similarity(tuple(Part(self.looks[name], weight, picture) for name, weight in weights.items() if weight))

    def optimised(self, case: effect_hiper.Case, arm: Arm, settings: Settings) -> Any:
        """The LoRA and the pictures on the way."""
        import torch

        from ..core.host.likeness_optimisation import Generator, Plan, Sampling, optimise_lora
        from ..core.siso import SisoSettings

        prompt = prompt_of(case, not arm.simple)
        generator = Generator(self.world.model, self.vae, self.conditioning(prompt), self.conditioning(""))
        latent = torch.zeros(1, 4, SIDE // 8, SIDE // 8)
        with torch.inference_mode():
            return optimise_lora(
                generator,
                self.similarity(case, arm),
                Sampling(latent, self.sigmas(), case.seed, CFG, settings.grad_steps),
                Plan(settings.iterations, settings.rank),
                SisoSettings(settings.learning_rate, settings.weight_decay, patience=settings.patience),
            )

    def reused(self, case: effect_hiper.Case, lora: dict | None) -> Any:
        """Pictures [4, 3, 96, 96] of the subject's class in the other place, by stock loader and sampler."""
        import comfy.sample
        import comfy.sd
        import torch

        with torch.inference_mode():
            model = self.world.model
            if lora is not None:
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
            shape = (SAMPLES, 4, SIDE // 8, SIDE // 8)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed + 1))
            latents = comfy.sample.sample(
                model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform",
                self.conditioning(prompt_of(case, True)), self.conditioning(""), torch.zeros(shape),
                disable_pbar=True, seed=case.seed,
            )  # fmt: skip
            return self.world.vae.decode(latents).movedim(-1, 1)

    def scored(self, case: effect_hiper.Case, pictures: Any, placed: bool) -> dict[str, float]:
        """All scores of pictures [N, 3, 96, 96], each a mean. placed: whether the prompt named the other place."""
        import torch

        from ..core.host.vision import embed
        from ..core.measures import cosine
        from ..toyworld import world

        with torch.inference_mode():
            found = {"identity": self.identity(case, pictures)}
            for name, vision in self.looks.items():
                seen = embed(vision, torch.cat([self.picture(case), pictures.movedim(1, -1)]))
                found[name] = float(cosine(seen[1:], seen[:1]).mean())
            found["text"] = self.text(prompt_of(case, placed), pictures)
            judged = self.judge.attributes(pictures)
            obeyed = judged["class"] == world.CLASSES.index(case.identity.cls)
            if placed:
                obeyed &= judged["background"] == list(world.BACKGROUNDS).index(case.target_place)
            return {**found, "obeyed": float(obeyed.float().mean())}

    def row(self, case: effect_hiper.Case, settings: Settings) -> dict[str, Any]:
        """All figures of one subject: the picture of the training noise, and those of the other prompt."""
        found: dict[str, Any] = {"base, other prompt": self.scored(case, self.reused(case, None), True)}
        for arm in ARMS:
            optimised = self.optimised(case, arm, settings)
            placed, pictures = not arm.simple, optimised.pictures.movedim(-1, 1)
            base = "base" if arm.simple else "base, whole prompt"
            if base not in found:
                found[base] = self.scored(case, pictures[:1], placed)
            best = self.scored(case, pictures[optimised.best : optimised.best + 1], placed)
            found[arm.name] = {**best, "iterations": len(optimised.losses), "best": optimised.best + 1}
            found[f"{arm.name}, other prompt"] = self.scored(case, self.reused(case, optimised.lora), True)
        return found


def prompt_of(case: effect_hiper.Case, placed: bool) -> str:
    """The bare prompt, or the one that names another place too."""
    from ..toyworld import world

    bare = f"a photo of a {case.identity.cls}"
    return f"{bare} {world.BACKGROUNDS[case.target_place]}" if placed else bare


def stored(cases: list, path: Path | None, row_of: Any) -> list[dict[str, Any]]:
    """One row for each subject; each is stored as soon as it is there, and taken from there later."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for case in cases[len(rows) :]:
        rows.append({"subject": " ".join(word for word in vars(case.identity).values() if word), **row_of(case)})
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        shown = {
            name: " ".join(f"{v:.2f}" for v in part.values()) for name, part in rows[-1].items() if name != "subject"
        }
        sys.stdout.write(f"{len(rows):3d} {rows[-1]['subject']}: {shown}\n")
        sys.stdout.flush()
    return rows[: len(cases)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of everything, paired gains over the base, and what the gates ask of the full method."""
    from ..core.measures import paired_interval

    kinds = [name for name in rows[0] if name != "subject"]
    mean = {kind: {s: sum(row[kind][s] for row in rows) / len(rows) for s in rows[0][kind]} for kind in kinds}
    gains = {}
    for arm in ARMS:
        pairs = {arm.name: "base" if arm.simple else "base, whole prompt"}
        pairs[f"{arm.name}, other prompt"] = "base, other prompt"
        for kind, base in pairs.items():
            gains[kind] = {
                score: vars(paired_interval([row[kind][score] - row[base][score] for row in rows])) for score in SCORES
            }
    full, reuse = FULL.name, f"{FULL.name}, other prompt"
    gates = {
        "identity rises": gains[full]["identity"]["low"] > 0 and gains[full]["identity"]["share_won"] >= WON_GATE,
        "text falls by less than a tenth": mean[full]["text"] >= (1 - TEXT_GATE) * mean["base"]["text"],
        "identity above the base when reused": gains[reuse]["identity"]["low"] > 0,
    }
    found = {"subjects": len(rows), "mean": mean, "minus base": gains, "gates": gates}
    return {**found, "gates held": all(gates.values())}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.effect_siso")
    parser.add_argument("--subjects", type=int, default=16)
    parser.add_argument("--first", type=int, default=0, help="skip so many subjects; others than the table's: 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each subject's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    bench = Bench(hosting.start(options.threads))
    cases = effect_hiper.cases(options.first + options.subjects)[options.first :]
    rows = stored(cases, options.rows, lambda case: bench.row(case, settings))
    result = summary(rows)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    shared = {"cfg": CFG, "samples": SAMPLES, "sampling_steps": SAMPLING_STEPS}
    write(options.out, {"settings": {**asdict(settings), **shared}, "summary": result, "rows": rows})
    return int(not result["gates held"])
