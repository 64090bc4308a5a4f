"""Does Replace Subject put another subject into an image and leave the rest alone? On toyworld, counted.

For each held-out subject one image is rendered and inverted with its caption by the pack's own code, with null-text's
published settings or with direct inversion as the way back. Then the class in the caption becomes another one, "a photo
of a red striped dog on the grass" -> "... cat ...", and from the same noise with the same negatives images are sampled:
by the base model alone (plain swap), and with Replace Subject at several settings.

- Seen: the judge sees the new class.
- Background: PSNR to the source image's autoencoder round trip, outside of the judge's subject masks of both, from two
  pixels beyond their outline on: on the outline itself the subject's colour decides, and every image gets about the
  same figure (stored as "to the outline").
- Plain swap: the edited prompt from the same noise on the same way back, without Replace Subject.
- Base: how often the base model shows the class, for the same prompts from other noise.

    python toolbox/_load.py benchmarks.replace_subject --out benchmarks/results/replace_subject.json
    python toolbox/_load.py benchmarks.replace_subject --method direct --out benchmarks/results/replace_direct.json
    python toolbox/_load.py benchmarks.replace_subject --world flow --cases 16 \
        --out benchmarks/results/replace_flow.json
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..core.inversion.null_text import Method, NullTextSettings
from ..toyworld import world
from . import frame, subjects
from .subjects import Case

SEEN_GATE, BACKGROUND_GATE, GAIN_GATE = 0.85, 22.0, 6.0
PLAIN = "plain swap"


@dataclass(frozen=True)
class Settings:
    """samples: of the base model; margin: pixels around a subject that belong to its outline."""

    cfg: float = 7.5
    sampling_steps: int = 50
    samples: int = 2
    method: str = field(default="null-text", metadata={"choices": ("null-text", "direct", "direct edit")})
    margin: int = 2


WORLDS = {"unet": Settings(), "flow": Settings(cfg=4.0, sampling_steps=25, method="direct")}


@dataclass(frozen=True)
class Setting:
    """What Replace Subject is told."""

    end_percent: float = 1.0
    blend: float = 0.0
    grown: int | None = None  # pixels by which the source's subject mask is grown, to be the node's mask

    @property
    def name(self) -> str:
        """The name of its figures in a row."""
        blend = f", blend {self.blend:g}" if self.blend else ""
        return f"end {self.end_percent:g}{blend}" + ("" if self.grown is None else f", mask + {self.grown} px")


SETTINGS = (
    *(Setting(), Setting(0.4), Setting(0.4, 0.5)),
    *(Setting(0.4, grown=0), Setting(0.4, 0.5, 0), Setting(0.4, 0.5, 8)),
)


@dataclass(frozen=True)
class Replacement:
    """A held-out subject in its place, and the class that takes it."""

    case: Case
    new: str

    @property
    def seed(self) -> int:
        return self.case.seed

    @property
    def word(self) -> str:
        return self.case.identity.cls

    @property
    def prompt(self) -> str:
        return world.caption(self.case.identity, self.case.source_place)

    @property
    def label(self) -> str:
        return f"{self.prompt} -> {self.new}"


def replacements(count: int, harder: bool = False) -> list[Replacement]:
    """The first `count` held-out subjects, each with one of the seven other classes in turn."""
    found = []
    for index, case in enumerate(subjects.cases(count, harder)):
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
    """What an inversion of the source leaves: the noise, and the way back."""

    latent: dict[str, Any]
    noise: Any
    model: Any
    negative: list


class Bench(subjects.Bench):
    """The pack's own inversion and replacement on toyworld."""

    def __init__(self, settings: Settings, world: str = subjects.NARROW[0]) -> None:
        super().__init__(world)
        self.settings, self.levels = settings, self.sigmas(settings.sampling_steps)
        loaded: Any = self.world
        self.clip = NarrowClip(loaded) if world in subjects.NARROW else loaded.clip

    @torch.inference_mode()
    def inverted(self, wanted: Replacement) -> Inverted:
        """The published inversion of the source image, and a way back to it."""
        from ..core.inversion.host.ddim import invert_image, start_of
        from ..core.inversion.host.null_text import prepare_reconstruction
        from ..core.session.images import ImageSource

        model, prompt, empty = self.world.model, self.conditioning(wanted.prompt), self.conditioning("")
        latent = {"samples": self.world.vae.encode(self.image(wanted.case))}
        trajectory = invert_image(model, prompt, ImageSource(latent), self.levels, "published", 0)
        null_text, method = NullTextSettings(self.settings.cfg), cast(Method, self.settings.method)
        way = prepare_reconstruction(model, prompt, empty, trajectory, method, null_text, "empty prompt")
        return Inverted(*start_of(model, trajectory), way[-1], way[0])

    @torch.inference_mode()
    def images(self, model: Any, positive: list, start: Inverted) -> Any:
        """Images [2, 3, 96, 96] of the source and the edit."""
        import comfy.samplers

        from ..core.attention.host.prompt_to_prompt import repeat_latent

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, start.negative)
        guider.set_cfg(self.settings.cfg)
        both, euler = repeat_latent(start.latent), comfy.samplers.sampler_object("euler")
        noise = start.noise.generate_noise(both)
        return self.decoded(guider.sample(noise, both["samples"], euler, self.levels, disable_pbar=True, seed=0))

    @torch.inference_mode()
    def row(self, wanted: Replacement) -> dict[str, dict[str, float]]:
        """All figures of one case."""
        from ..core.attention.host.prompt_to_prompt import SubjectSwap, edited_prompt, replace_subject

        start = self.inverted(wanted)
        target = self.decoded(self.world.vae.encode(self.image(wanted.case)))
        mask = self.mask(target)[0] > 0.5
        edited = self.conditioning(edited_prompt(wanted.prompt, wanted.word, wanted.new))
        base = self.sampled(self.world.model, edited, wanted.seed, self.settings)
        found: dict[str, dict[str, float]] = {"base": {"seen": self.share_seen(base, cls=wanted.new)}}
        for setting in SETTINGS:
            place = None if setting.grown is None else grown(mask, setting.grown)
            swap = SubjectSwap(
                wanted.prompt, wanted.word, wanted.new, None, setting.end_percent, blend=setting.blend, mask=place
            )  # fmt: skip
            model, positive = replace_subject(start.model, self.clip, swap, start.latent)
            if PLAIN not in found:
                found[PLAIN] = self.scored(wanted, self.images(start.model, positive, start), target, mask)
            found[setting.name] = self.scored(wanted, self.images(model, positive, start), target, mask)
        return found

    def scored(self, wanted: Replacement, images: Any, target: Any, mask: Any) -> dict[str, float]:
        """seen, background (dB) of the edit, and the whole image's PSNR of the reconstruction."""
        both = mask | (self.mask(images[1:])[0] > 0.5)
        beyond, outside = (grown(both, pixels)[0] < 0.5 for pixels in (self.settings.margin, 0))
        return {
            "seen": self.share_seen(images[1:], cls=wanted.new),
            "background": psnr(images[1][:, beyond], target[0][:, beyond]),
            "to the outline": psnr(images[1][:, outside], target[0][:, outside]),
            "reconstruction": psnr(images[0], target[0]),
        }


def grown(mask: Any, pixels: int) -> Any:
    """A mask [H, W], wider by so many pixels on every side, as a MASK [1, H, W]."""
    return F.max_pool2d(mask.float()[None, None], 2 * pixels + 1, stride=1, padding=pixels)[0]


def psnr(one: Any, other: Any) -> float:
    """In dB, for values in 0..1."""
    return -10 * math.log10(max(float((one - other).square().mean()), 1e-10))


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means of every setting, its paired gain over the plain swap, and which gates it holds."""
    mean = frame.means(rows)
    base = mean.pop("base")["seen"]
    found: dict[str, Any] = {"cases": len(rows), "base seen": base}
    for name, scores in mean.items():
        gain = frame.gain(rows, name, PLAIN, "background")
        gates = {
            "new subject seen": scores["seen"] >= SEEN_GATE * base,
            "background": scores["background"] >= BACKGROUND_GATE,
            "background against plain swap": gain["mean"] >= GAIN_GATE,
        }
        found[name] = frame.gated({**scores, "gain": gain}, gates)
    return found


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when no setting holds the gates."""
    run = frame.Run("replace_subject", arguments, WORLDS, cases=32)
    rows = run.rows(run.chosen(replacements), lambda: Bench(run.settings, run.world), Bench.row)
    result, settings = summary(rows), asdict(run.settings)
    settings["base samples"] = settings.pop("samples")
    held = any(part["gates held"] for part in result.values() if isinstance(part, dict))
    return run.judged(rows, result, held, settings)
