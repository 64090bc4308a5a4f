"""Does Replace Subject put another subject into a picture and leave the rest alone? On the small world, counted.

For each held-out subject one picture is rendered and inverted with its caption by the pack's own code, with null-text's
published settings or with direct inversion as the way back. Then the class in the caption becomes another one, "a photo
of a red striped dog on the grass" -> "... cat ...", and from the same noise with the same negatives pictures are
sampled: by the base model alone (plain swap), and with Replace Subject at several settings.

- Seen: the judge sees the new class.
- Background: PSNR to the source picture's autoencoder round trip, outside of the judge's subject masks of both, from
  two pixels beyond their outline on: on the outline itself the subject's colour decides, and every picture gets about
  the same figure (stored as "to the outline").
- Plain swap: the edited prompt from the same noise on the same way back, without Replace Subject.
- Base: how often the base model shows the class, for the same prompts from other noise.

The narrow form of the small world is used: the same function as the checkpoint, at a fraction of the cost.

    python toolbox/_load.py benchmarks.replace_subject --out benchmarks/results/replace_subject.json
    python toolbox/_load.py benchmarks.replace_subject --method direct --out benchmarks/results/replace_direct.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import effect_hiper, hosting
from .effect_sine import write

CFG, SAMPLING_STEPS, BASE_SAMPLES, SIDE = 7.5, 50, 2, 96
MARGIN = 2  # pixels around a subject that belong to its outline
SEEN_GATE, BACKGROUND_GATE, GAIN_GATE = 0.85, 22.0, 6.0


@dataclass(frozen=True)
class Setting:
    """What Replace Subject is told."""

    end_percent: float = 1.0
    blend: float = 0.0
    grown: int | None = None  # pixels by which the source's subject mask is grown, to be the node's mask

    @property
    def name(self) -> str:
        """How rows call it."""
        blend = f", blend {self.blend:g}" if self.blend else ""
        return f"end {self.end_percent:g}{blend}" + ("" if self.grown is None else f", mask + {self.grown} px")


PLAIN = "plain swap"
METHODS = ("null-text", "direct")
SETTINGS = (
    *(Setting(), Setting(0.4), Setting(0.4, 0.5)),
    *(Setting(0.4, grown=0), Setting(0.4, 0.5, 0), Setting(0.4, 0.5, 8)),
)


@dataclass(frozen=True)
class Replacement:
    """A held-out subject in its place, and the class that takes it."""

    case: effect_hiper.Case
    new: str

    @property
    def word(self) -> str:
        return self.case.identity.cls

    @property
    def prompt(self) -> str:
        from ..toyworld import world

        return world.caption(self.case.identity, self.case.source_place)


def replacements(count: int) -> list[Replacement]:
    """The first `count` held-out subjects, each with one of the seven other classes in turn."""
    from ..toyworld import world

    found = []
    for index, case in enumerate(effect_hiper.cases(count)):
        own = world.CLASSES.index(case.identity.cls)
        step = 1 + (index // len(world.CLASSES)) % (len(world.CLASSES) - 1)
        found.append(Replacement(case, world.CLASSES[(own + step) % len(world.CLASSES)]))
    return found


class NarrowClip:
    """The narrow world's text encoder with the calls of ComfyUI's CLIP that the pack makes."""

    def __init__(self, world: Any) -> None:
        self._world = world

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        """The text itself for encoding, or tokens with weight and word number, 0 for none."""
        if not return_word_ids:
            return text
        found = self._world.tokenizer(text)["input_ids"]
        return {"l": [[(token, 1.0, int(0 < at < len(found) - 1)) for at, token in enumerate(found)]]}

    def encode_from_tokens_scheduled(self, text: str) -> list:
        """As CLIP."""
        return [[self._world.encode(text), {}]]


@dataclass(frozen=True)
class Inverted:
    """What an inversion of the source leaves: the noise, the levels, and the way back."""

    latent: dict[str, Any]
    sigmas: Any
    model: Any
    negative: list


class Bench(effect_hiper.Bench):
    """The small world's models and measures, and the pack's own inversion and replacement on them."""

    def inverted(self, wanted: Replacement, method: str) -> Inverted:
        """The published inversion of the source picture, and a way back to it."""
        import comfy.samplers
        import torch

        from ..core.inversion.host.ddim import inverted, start_latent
        from ..core.inversion.host.null_text import way_back
        from ..core.inversion.null_text import NullTextSettings

        model, prompt = self.world.model, self.conditioning(wanted.prompt)
        with torch.inference_mode():
            sampling = model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", SAMPLING_STEPS)
            latent = {"samples": self.world.vae.encode(self.picture(wanted.case))}
            trajectory = inverted(model, prompt, latent, None, None, sigmas, "published", 0)
            chosen = "direct" if method == "direct" else "null-text"
            empty = self.conditioning("")
            way = way_back(model, prompt, empty, trajectory, chosen, NullTextSettings(CFG), "empty prompt")
            return Inverted(start_latent(model, trajectory), sigmas, way.model, way.negative)

    def pictures(self, model: Any, positive: list, start: Inverted) -> Any:
        """Pictures [2, 3, 96, 96] of the source and the edit."""
        import comfy.samplers
        import torch

        from ..core.attention.host.prompt_to_prompt import twice

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, start.negative)
        guider.set_cfg(CFG)
        samples = twice(start.latent)["samples"]
        with torch.inference_mode():
            euler = comfy.samplers.sampler_object("euler")
            found = guider.sample(torch.zeros_like(samples), samples, euler, start.sigmas, disable_pbar=True, seed=0)
            return self.world.vae.decode(found).movedim(-1, 1)

    def base_rate(self, wanted: Replacement) -> float:
        """How often the base model alone shows the new class for the edited prompt."""
        import comfy.sample
        import torch

        from ..core.attention.host.prompt_to_prompt import edited_prompt

        seed = wanted.case.seed
        shape = (BASE_SAMPLES, 4, SIDE // 8, SIDE // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        positive = self.conditioning(edited_prompt(wanted.prompt, wanted.word, wanted.new))
        with torch.inference_mode():
            latents = comfy.sample.sample(
                self.world.model, noise, SAMPLING_STEPS, CFG, "euler", "ddim_uniform", positive, self.conditioning(""),
                torch.zeros(shape), disable_pbar=True, seed=seed,
            )  # fmt: skip
            return self.seen(wanted, self.world.vae.decode(latents).movedim(-1, 1))

    def seen(self, wanted: Replacement, pictures: Any) -> float:
        """The share of pictures in which the judge sees the new class."""
        from ..toyworld import world

        found = self.judge.attributes(pictures)["class"] == world.CLASSES.index(wanted.new)
        return float(found.float().mean())

    def row(self, wanted: Replacement, method: str) -> dict[str, dict[str, float]]:
        """All figures of one case."""
        import torch

        from ..core.attention.host.prompt_to_prompt import replaced_subject

        start = self.inverted(wanted, method)
        with torch.inference_mode():
            source = self.picture(wanted.case)
            target = self.world.vae.decode(self.world.vae.encode(source)).movedim(-1, 1)
            mask = self.judge.mask(target)[0] > 0.5
            found: dict[str, dict[str, float]] = {"base": {"seen": self.base_rate(wanted)}}
            clip = NarrowClip(self.world)
            for setting in SETTINGS:
                model, positive = replaced_subject(
                    start.model, clip, wanted.prompt, wanted.word, wanted.new, None, setting.end_percent,
                    blend=setting.blend, mask=None if setting.grown is None else grown(mask, setting.grown),
                )  # fmt: skip
                if PLAIN not in found:
                    plain = self.pictures(start.model, positive, start)
                    found[PLAIN] = self.scored(wanted, plain, target, mask)
                found[setting.name] = self.scored(wanted, self.pictures(model, positive, start), target, mask)
        return found

    def scored(self, wanted: Replacement, pictures: Any, target: Any, mask: Any) -> dict[str, float]:
        """seen, background (dB) of the edit, and the whole picture's PSNR of the reconstruction."""
        subjects = mask | (self.judge.mask(pictures[1:])[0] > 0.5)
        beyond, outside = (grown(subjects, pixels)[0] < 0.5 for pixels in (MARGIN, 0))
        return {
            "seen": self.seen(wanted, pictures[1:]),
            "background": psnr(pictures[1][:, beyond], target[0][:, beyond]),
            "to the outline": psnr(pictures[1][:, outside], target[0][:, outside]),
            "reconstruction": psnr(pictures[0], target[0]),
        }


def stored(bench: Bench, chosen: list[Replacement], method: str, path: Path | None) -> list[dict[str, Any]]:
    """One row for each case; each is stored as soon as it is there, and taken from there later."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    for wanted in chosen[len(rows) :]:
        row = bench.row(wanted, method)
        rows.append({"subject": f"{wanted.prompt} -> {wanted.new}", **row})
        if path:
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        shown = {name: " ".join(f"{value:.2f}" for value in scores.values()) for name, scores in row.items()}
        sys.stdout.write(f"{len(rows):3d} {rows[-1]['subject']}: {shown}\n")
        sys.stdout.flush()
    return rows[: len(chosen)]


def grown(mask: Any, pixels: int) -> Any:
    """A mask [H, W], wider by so many pixels on every side, as a MASK [1, H, W]."""
    import torch.nn.functional as F

    return F.max_pool2d(mask.float()[None, None], 2 * pixels + 1, stride=1, padding=pixels)[0]


def psnr(one: Any, other: Any) -> float:
    """In dB, for values in 0..1."""
    return -10 * math.log10(max(float((one - other).square().mean()), 1e-10))


def summary(rows: list[dict]) -> dict[str, Any]:
    """Means of every setting, its paired gain over the plain swap, and which gates it holds."""
    from ..core.vision.measures import paired_interval

    count = len(rows)
    base = sum(row["base"]["seen"] for row in rows) / count
    found: dict[str, Any] = {"cases": count, "base seen": base}
    for name in (name for name in rows[0] if name not in ("subject", "base")):
        mean = {score: sum(row[name][score] for row in rows) / count for score in rows[0][name]}
        gain = paired_interval([row[name]["background"] - row[PLAIN]["background"] for row in rows])
        gates = {
            "new subject seen": mean["seen"] >= SEEN_GATE * base,
            "background": mean["background"] >= BACKGROUND_GATE,
            "background against plain swap": gain.mean >= GAIN_GATE,
        }
        found[name] = {**mean, "gain": vars(gain), "gates": gates, "gates held": all(gates.values())}
    return found


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when no setting holds the gates."""
    parser = argparse.ArgumentParser(prog="benchmarks.replace_subject")
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="store each case's figures here, and go on from them")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    hosting.start(options.threads)
    bench = Bench()
    chosen = replacements(options.cases)
    rows = stored(bench, chosen, options.method, options.rows)
    result = summary(rows)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    settings = {"cfg": CFG, "sampling_steps": SAMPLING_STEPS, "base samples": BASE_SAMPLES}
    settings |= {"method": options.method, "margin": MARGIN}
    write(options.out, {"settings": settings, "summary": result, "rows": rows})
    return int(not any(isinstance(part, dict) and part["gates held"] for part in result.values()))
