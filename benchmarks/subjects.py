"""Held-out subjects of toyworld, and the models that show and judge them.

The narrow form of toyworld is used: the same function as the checkpoint, at a fraction of the cost. Identity is the
cosine of an encoder that no loss uses, between the judge's subject crops on white; the text score is the scorer's
cosine with a prompt.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..toyworld import comfyui, fine, narrow, world
from ..toyworld.judge import load_judge, subject_crop
from ..toyworld.train_scorer import embeddings, text_inputs
from ..toyworld.vision_models import features, load_model
from . import hosting

SIDE = 96
FIRST_SEED = 800_000
NARROW = ("unet", "turbo")  # the SD1.x generator, and its student of one to four steps at cfg 1
ATTRIBUTES = {"class": world.CLASSES, "texture": world.TEXTURES, "background": tuple(world.BACKGROUNDS)}


@dataclass(frozen=True)
class Case:
    """A held-out subject, the place of its one image and the place of the edit; both combinations are held out."""

    identity: Any
    source_place: str
    target_place: str
    seed: int

    @property
    def label(self) -> str:
        """The subject's words."""
        return " ".join(str(word) for word in vars(self.identity).values() if word)

    def prompt(self, place: str) -> str:
        """Class, colour and place: tone, pattern and emblem of the subject must come from its image."""
        return world.caption(self.identity, place, words=("color", "background"))

    def class_prompt(self, place: str = "", word: str = "") -> str:
        """Class, and place if one is given."""
        return f"a photo of a {word}{self.identity.cls}" + (f" {world.BACKGROUNDS[place]}" if place else "")


@dataclass(frozen=True)
class Exchange:
    """An image of one subject, and another one of its class that shall stand in it."""

    source: Case
    wanted: Case

    @property
    def label(self) -> str:
        return f"{self.source.label} -> {self.wanted.label}"

    @property
    def seed(self) -> int:
        return self.source.seed


def cases(count: int, harder: bool = False, seed: int = FIRST_SEED) -> list[Case]:
    """The first `count` held-out subjects, classes taken in turn. harder: with fine parts, which no caption names and
    no generator was trained on. seed: of the first; another one gives other tones and emblems.
    """
    draw = fine.identity if harder else world.identity
    places: dict[tuple[str, str, str], list[str]] = {}
    for cls, color, texture, place in world.held_out_combinations():
        places.setdefault((cls, color, texture), []).append(place)
    by_class: dict[str, list[tuple[str, str, str]]] = {}
    for key, found in sorted(places.items()):
        if len(found) >= 2:
            by_class.setdefault(key[0], []).append(key)
    turns = [
        keys[turn] for turn in range(max(map(len, by_class.values()))) for keys in by_class.values() if turn < len(keys)
    ]
    return [
        Case(draw(seed + index, *key), places[key][0], places[key][1], seed + index)
        for index, key in enumerate(turns[:count])
    ]


def rendered(identity: Any, place: str, *seeds: int) -> torch.Tensor:
    """A real render for each seed, [N, 96, 96, 3] in 0..1."""
    renders = [world.render(identity, place, seed)[0] for seed in seeds]
    return torch.from_numpy(np.stack(renders)).float() / 255


@dataclass
class StockWorld:
    """A generator as the checkpoint's loader gives it."""

    model: Any
    clip: Any
    vae: Any
    tokenizer: Any
    scheduler: str = "simple"

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.model.get_model_object("latent_format").latent_channels

    def conditioning(self, prompt: str) -> list:
        """CONDITIONING of a prompt."""
        return hosting.encoded(self.clip, prompt)[0]


def load_world(name: str) -> StockWorld:
    """The flow transformer or its student."""
    import folder_paths
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))
    return StockWorld(*hosting.small_world(Path(folder_paths.base_path), name), tokenizer)


class Bench:
    """Toyworld's models and measures; a benchmark adds the pack's own code on them."""

    def __init__(self, world: str = NARROW[0]) -> None:
        self.world = narrow.load_narrow(student=world == "turbo") if world in NARROW else load_world(world)
        self.judge, self.measure, self.scorer = load_judge(), load_model("measure"), load_model("clip")

    @functools.cached_property
    def fine(self) -> torch.nn.Module:
        """The encoder that knows harder subjects apart."""
        return load_model("fine")

    def conditioning(self, prompt: str) -> list:
        return self.world.conditioning(prompt)

    def image(self, case: Case) -> torch.Tensor:
        """The one image of the subject [1, 96, 96, 3]."""
        return rendered(case.identity, case.source_place, case.seed)

    def sigmas(self, steps: int, scheduler: str = "") -> torch.Tensor:
        """The levels of a sampling, by the world's own scheduler if none is named."""
        return hosting.levels(self.world.model, steps, scheduler or self.world.scheduler)

    def noise(self, seed: int, count: int, width: int = SIDE) -> torch.Tensor:
        """[count, C, 12, width / 8]."""
        shape = count, self.world.channels, SIDE // 8, width // 8
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W]."""
        return self.world.vae.decode(latents).movedim(-1, 1)

    @torch.inference_mode()
    def sampled(
        self, model: Any, positive: list, seed: int, settings: Any, count: int | None = None, width: int = SIDE
    ) -> torch.Tensor:
        """Images [N, 3, 96, width] by ComfyUI's own sampler. settings: samples, sampling_steps and cfg."""
        import comfy.sample

        noise = self.noise(seed, settings.samples if count is None else count, width)
        latents = comfy.sample.sample(
            model, noise, settings.sampling_steps, settings.cfg, "euler", self.world.scheduler, positive,
            self.conditioning(""), torch.zeros_like(noise), disable_pbar=True, seed=seed,
        )  # fmt: skip
        return self.decoded(latents)

    @torch.inference_mode()
    def mask(self, images: torch.Tensor) -> torch.Tensor:
        """The judge's subject masks [N, 96, 96], ones and zeros, of images [N, 3, 96, 96]."""
        return (self.judge.mask(images) > 0.5).float()

    @torch.inference_mode()
    def share_seen(self, images: torch.Tensor, **asked: str) -> float:
        """The share of images in which the judge sees all that is asked (cls, texture, background)."""
        found = self.judge.attributes(images)
        names = {name: "class" if name == "cls" else name for name in asked}
        seen = [found[names[name]] == ATTRIBUTES[names[name]].index(word) for name, word in asked.items()]
        return float(torch.stack(seen).all(0).float().mean())

    @torch.inference_mode()
    def looks(self, images: torch.Tensor, encoder: torch.nn.Module | None = None) -> torch.Tensor:
        """The measuring encoder's unit features of the subject crops, or another one's."""
        return F.normalize(
            features(encoder or self.measure, subject_crop(images, self.judge.mask(images), SIDE)), dim=1
        )

    def identity(self, case: Case, images: torch.Tensor) -> float:
        """Mean cosine of the images' subject crops with the source image's, by the encoder for such subjects."""
        encoder = self.fine if isinstance(case.identity, fine.FineIdentity) else None
        found = self.looks(torch.cat([self.image(case).movedim(-1, 1), images]), encoder)
        return float((found[1:] @ found[0]).mean())

    @torch.inference_mode()
    def text(self, prompt: str, images: torch.Tensor) -> float:
        """Mean cosine of the images with a prompt."""
        seen, read, _ = embeddings(self.scorer, images, text_inputs(self.world.tokenizer, [prompt]))
        return float((seen @ read[0]).mean())

    def judged(self, case: Case, images: torch.Tensor) -> dict[str, float]:
        """Identity, and the text score with the target prompt."""
        return {"identity": self.identity(case, images), "text": self.text(case.prompt(case.target_place), images)}

    def control(self, case: Case) -> dict[str, float]:
        """The scores of a real render of the subject in the target place."""
        return self.judged(case, rendered(case.identity, case.target_place, case.seed + 1).movedim(-1, 1))
