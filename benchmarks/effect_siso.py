"""Does SISO's LoRA bring the one subject into the image, and does the image still obey the prompt? On toyworld.

For each held-out subject one image is rendered, and a LoRA is optimised with the pack's own code against the likeness
of the generated image, from one noise and a plain prompt, "a photo of a <class> on a white background", in few steps.
Then the LoRA is reused in another place, "a photo of a <class> in the snow", with more steps: from the same noise, as
the authors' script does it, and from four others.

The loss looks with two of toyworld's vision models, DINO (in the place of DINOv2) and CLIP (in the place of the
retrieval model, which has no small form): at the whole generated image, and at the subject's image cut out on white by
the judge's mask, since this DINO knows nothing else.

- Identity: the measuring encoder's cosine between the judge's subject crops on white; that encoder is in no loss.
- DINO, CLIP: the cosines that are in the loss, beside it.
- Text: the scorer's cosine with the prompt. The scorer is the CLIP of the loss; the arm with DINO alone is free of it.
- Obeyed: the judge sees the class and the place.

The one-step student is trained from one noise, as published, and with a new noise in every iteration, which is judged.

    python toolbox/_load.py benchmarks.effect_siso --rows ROWS.jsonl --out benchmarks/results/effect_siso.json
    python toolbox/_load.py benchmarks.effect_siso --world turbo --ablations 8 \
        --out benchmarks/results/effect_siso_turbo.json
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.siso.siso import SisoSettings
from ..core.vision.measures import cosine
from ..toyworld.narrow import NarrowWorld
from ..toyworld.vision_models import FOLDERS, build_vision_folders
from ..toyworld.widen import SD15_LATENT_SCALE
from . import frame, hosting, subjects
from .subjects import Case

WON_GATE, TEXT_GATE, RISE_GATE = 0.80, 0.10, 0.25
STUDIO = "studio"
SCORES = ("identity", "dino", "clip", "text", "obeyed")
PAIRS = {
    "optimised": "base",
    "reused": "base, other prompt",
    "reused, other noise": "base, other prompt, other noise",
}


@dataclass(frozen=True)
class Settings:
    """SISO's recipe for a model of many steps (Sana's), with toyworld's own rate and few steps in training.

    steps: of the sampling in training; sampling_steps: with the finished LoRA.
    """

    iterations: int = 50
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    rank: int = 4
    steps: int = 5
    grad_steps: int = 3
    patience: int = 5
    cfg: float = 4.5
    samples: int = 4
    sampling_steps: int = 10


WORLDS = {
    "unet": Settings(),
    # The published settings of SDXL-turbo: the whole image has a gradient.
    "turbo": Settings(weight_decay=1e-2, steps=1, grad_steps=1, patience=7, cfg=1.0, sampling_steps=4),
    "flow_turbo": Settings(steps=1, grad_steps=1, patience=7, cfg=1.0, sampling_steps=4),  # of FLUX.1-schnell
}


@dataclass(frozen=True)
class Arm:
    """A way of training: how much each vision model counts, whether the prompt is the bare one, whether each iteration
    has a noise of its own, and whether the text encoder is trained too.
    """

    name: str
    dino: float = 1.0
    clip: float = 1.0
    simple: bool = True
    new_noise: bool = False
    text: bool = False


FULL = Arm("both features")
NEW = Arm("new noise", new_noise=True)
ARMS = (
    FULL,
    NEW,
    Arm("DINO only", clip=0.0),
    Arm("CLIP only", dino=0.0),
    Arm("no prompt simplification", simple=False),
    Arm("text encoder too", text=True),
    Arm("new noise, text encoder too", new_noise=True, text=True),
)
JUDGED = {"unet": FULL, "turbo": NEW, "flow_turbo": NEW}  # the arm that the gates ask of


@dataclass(frozen=True)
class Trained:
    """A subject and a way of training."""

    case: Case
    arm: Arm

    @property
    def seed(self) -> int:
        return self.case.seed

    def place(self, placed: bool) -> str:
        """The plain place, or the other one that a prompt names."""
        return self.case.target_place if placed else STUDIO


class HostedVAE:
    """The narrow autoencoder with what the pack asks of ComfyUI's VAE to decode with a gradient."""

    def __init__(self, narrow: Any) -> None:
        import comfy.model_patcher

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


class Bench(subjects.Bench):
    """The pack's own optimisation on toyworld."""

    def __init__(self, base: Path, settings: Any, world: str = subjects.NARROW[0], wide: bool = False) -> None:
        from ..core.vision.host.vision import load_vision

        super().__init__(world)
        self.base, self.settings, self.name = base, settings, world
        if wide:
            self.world = subjects.load_world(world)
        folders = build_vision_folders(base / "vision")
        with torch.inference_mode():
            self.encoders = {name: load_vision(folders[FOLDERS[name]]) for name in ("dino", "clip")}
        self.clip = None if isinstance(self.world, NarrowWorld) else self.world.clip
        self.vae = HostedVAE(self.world.vae) if self.clip is None else self.world.vae

    @functools.cached_property
    def wide(self) -> Bench:
        """The same on the full checkpoint, which has a CLIP to train."""
        return Bench(self.base, self.settings, self.name, wide=True)

    @torch.inference_mode()
    def similarity(self, case: Case, arm: Arm) -> Any:
        """What the loss compares with."""
        from ..core.siso.host.similarity import Similarity, similarity_part

        image = self.image(case)
        mask = self.mask(image.movedim(-1, 1))
        used = {name: weight for name, weight in {"dino": arm.dino, "clip": arm.clip}.items() if weight}
        return Similarity(
            tuple(similarity_part(self.encoders[name], weight, image, mask) for name, weight in used.items())
        )

    @torch.inference_mode()
    def optimised(self, trained: Trained) -> Any:
        """The LoRA and the images on the way."""
        from ..core.siso.host.optimize_lora import Generator, Sampling, SisoJob, SisoPlan, optimize_lora

        case, arm, how = trained.case, trained.arm, self.settings
        prompt, clip = case.class_prompt(trained.place(not arm.simple)), self.clip if arm.text else None
        positive = self.conditioning(prompt)
        job = SisoJob(
            Generator(self.world.model, self.vae, positive, self.conditioning(""), clip, prompt),
            self.similarity(case, arm),
            Sampling(torch.zeros_like(self.noise(0, 1)), self.sigmas(how.steps), case.seed, how.cfg, how.grad_steps),
            SisoPlan(how.iterations, how.rank, new_noise=arm.new_noise),
            SisoSettings(how.learning_rate, how.weight_decay, how.learning_rate, patience=how.patience),
        )
        return optimize_lora(job)

    @torch.inference_mode()
    def reused(self, trained: Trained, lora: dict | None, others: bool, again: bool = False) -> Any:
        """Images [N, 3, 96, 96] of the subject's class in the other place, by stock loader and sampler: one from the
        noise of the training's seed, or some from others. again: as in the training, with its prompt and steps."""
        import comfy.sd

        model, clip = self.world.model, self.clip if trained.arm.text else None
        if lora is not None:
            model, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
        prompt = trained.case.class_prompt(trained.place(not again))
        positive = self.conditioning(prompt) if clip is None else hosting.encoded(clip, prompt)[0]
        how = replace(self.settings, sampling_steps=self.settings.steps) if again else self.settings
        return self.sampled(model, positive, trained.seed + others, how, None if others else 1)

    @torch.inference_mode()
    def scored(self, trained: Trained, images: Any, placed: bool) -> dict[str, float]:
        """All scores of images [N, 3, 96, 96], each a mean. placed: whether the prompt names the other place."""
        from ..core.vision.host.vision import embed

        case, place = trained.case, trained.place(placed)
        found = {"identity": self.identity(case, images)}
        for name, part in zip(self.encoders, self.similarity(case, FULL).parts, strict=True):
            wanted, seen = (embed(part.vision, each) for each in (part.references, images.movedim(1, -1)))
            found[name] = float(cosine(seen, wanted).mean())
        found["text"] = self.text(case.class_prompt(place), images)
        return {**found, "obeyed": self.share_seen(images, cls=case.identity.cls, background=place)}

    def row(self, trained: Trained) -> dict[str, Any]:
        """The training's image before and after, and those of the other prompt without and with the LoRA."""
        if trained.arm.text and self.clip is None:
            return self.wide.row(trained)
        optimised = self.optimised(trained)
        placed, images = not trained.arm.simple, optimised.images.movedim(-1, 1)
        best = images[optimised.best : optimised.best + 1]
        if trained.arm.new_noise:  # the best one's noise is another
            best = self.reused(trained, optimised.lora, others=False, again=True)
        found = {
            "base": self.scored(trained, images[:1], placed),
            "optimised": {
                **self.scored(trained, best, placed),
                "iterations": len(optimised.losses),
                "best": optimised.best + 1,
            },
        }
        for name, others in {"": False, ", other noise": True}.items():
            found[f"base, other prompt{name}"] = self.scored(trained, self.reused(trained, None, others), True)
            found[f"reused{name}"] = self.scored(trained, self.reused(trained, optimised.lora, others), True)
        return found


def figures(rows: frame.Rows) -> dict[str, Any]:
    """Means of one arm, and its paired gains over the base."""
    gains = {kind: {s: frame.gain(rows, kind, base, s) for s in SCORES} for kind, base in PAIRS.items()}
    return {"subjects": len(rows), "mean": frame.means(rows), "minus base": gains}


def summary(rows: frame.Rows, judged: str) -> dict[str, Any]:
    """The figures of every arm that has rows, those of the full method also over the others' subjects alone, and what
    the gates ask of one of them."""
    by_arm = {arm.name: [row for row in rows if row["arm"] == arm.name] for arm in ARMS}
    others = {row["subject"] for row in rows if row["arm"] not in (FULL.name, judged)}
    by_arm[f"{FULL.name}, the ablations' subjects"] = [row for row in by_arm[FULL.name] if row["subject"] in others]
    found = {name: figures(some) for name, some in by_arm.items() if len(some) > 1}
    mean, gain = found[judged]["mean"], found[judged]["minus base"]
    identity = gain["optimised"]["identity"]
    lost = {kind: 1 - mean[kind]["text"] / mean[PAIRS[kind]]["text"] for kind in ("optimised", "reused")}
    again, elsewhere = gain["reused"]["identity"], gain["reused, other noise"]["identity"]
    if judged == FULL.name:
        gates = {
            "identity rises": identity["low"] > 0 and identity["share_won"] >= WON_GATE,
            "text falls by less than a tenth": lost["optimised"] < TEXT_GATE,
            "identity above the base when reused": again["low"] > 0,
        }
    else:
        gates = {
            "identity rises by a quarter": identity["mean"] >= RISE_GATE and identity["low"] > 0,
            "and in another prompt": again["low"] > 0 and again["share_won"] >= WON_GATE,
            "and there from other noise": elsewhere["low"] > 0,
        }
    return frame.gated({"arms": found, "judged": judged, "text lost": lost}, gates)


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when a gate is missed."""
    options = {"--ablations": {"type": int, "default": 16, "help": "subjects of the other ways of training"}}
    run = frame.Run("effect_siso", arguments, WORLDS, options, subjects=16)
    cases = run.chosen(subjects.cases)
    main_arms = {FULL: None, JUDGED[run.world]: None}
    pairs = [Trained(case, arm) for arm in main_arms for case in cases]
    pairs += [Trained(case, arm) for case in cases[: run.options.ablations] for arm in ARMS if arm not in main_arms]
    rows = run.rows(
        pairs,
        lambda: Bench(run.base, run.settings, run.world),
        Bench.row,
        lambda trained: {"arm": trained.arm.name, "subject": trained.case.label},
    )
    return run.judged(rows, summary(rows, JUDGED[run.world].name))
