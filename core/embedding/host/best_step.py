"""Choose the step of an embedding by images of a prompt that it was not trained with.

HiPer's authors pick the step by eye (README: 'choose from 1000 to 1500'). Here images of the new prompt are drawn at
every saved step, from the same noise, and scored. An earlier step than the last is chosen only where it is clearly more
alike (the 95 % interval of the difference, image by image, is above 0) and follows the prompt at least as well: without
the first condition noise chose too early a step, and cost identity (docs/results.md).
"""

from dataclasses import dataclass, replace
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ...fit.fit import evenly
from ...prompt.conditioning import Conditioning, apply_embedding
from ...vision.host.scoring import TITLES, Request, Scores, check, score
from ..artifact import Embedding
from .train import Previews


@dataclass(frozen=True)
class Trial:
    """What is drawn at each step. latent [B, C, h, w]: an empty one, for its size; images: per step, from one noise
    each; most: the number of steps that are tried.
    """

    prompt: Conditioning
    latent: Tensor
    sampling: Previews
    scale: float
    images: int
    most: int


@dataclass(frozen=True)
class Choice:
    """images: `images` without the subject, then as many for each of the steps; scores: of every image."""

    embedding: Embedding
    steps: list[int]
    images: Tensor
    scores: Scores

    @property
    def step(self) -> int:
        return self.embedding.recommended_step

    @property
    def best_image(self) -> int:
        return (1 + self.steps.index(self.step)) * (len(self.images) // (len(self.steps) + 1))

    def captions(self) -> list[list[str]]:
        """For each image what it shows, and its scores."""
        each = len(self.images) // (len(self.steps) + 1)
        names = ["without", *(f"step {step}" for step in self.steps)]
        return [[names[i // each], *self.scores.lines(i)[1:]] for i in range(len(self.images))]

    def report(self) -> str:
        """What the best step gained in plain words, then a table with one row per step."""
        scores = _per_step(self.scores, len(self.steps) + 1)
        means = {name: values.mean(1).tolist() for name, values in scores.items()}
        best = 1 + self.steps.index(self.step)
        words = {"dino": "alike", "clip_i": "alike (CLIP)", "clip_t": "follows the prompt"}
        gains = [f"{words[name]}: {values[0]:.2f} -> {values[best]:.2f}" for name, values in means.items()]
        lines = [f"best step: {self.step}", *gains]
        lines.append("    step" + "".join(f"{TITLES[name]:>9}" for name in means))
        for row, name in enumerate(["without", *map(str, self.steps)]):
            numbers = "".join(f"{values[row]:>9.4f}" for values in means.values())
            lines.append(f"{name:>8}{numbers}" + ("  best" if row == best else ""))
        return "\n".join([*lines, *self.scores.models])


def choose_step(model: Any, embedding: Embedding, trial: Trial, request: Request) -> Choice:
    """The embedding with its best step as the recommended one.

    request: how images are scored, with the reference for images. ValueError before any sampling for one that measures
    no likeness.
    """
    check(request)
    if not {"dino", "clip_i"} & set(request.measured()):
        raise ValueError("Nothing measures likeness: connect a vision model to 'dino' or 'clip', and 'reference'.")
    steps = evenly(sorted(embedding.rows), trial.most)
    rows = [embedding.at(step) for step in steps]
    placed = [apply_embedding(trial.prompt, each, trial.scale, embedding.windows, embedding.placement) for each in rows]
    shape = comfy.sample.fix_empty_latent_channels(model, torch.zeros_like(trial.latent[:1])).shape
    images = trial.sampling.drawn(model, [trial.prompt, *placed], tuple(shape), trial.images)
    scores = score(replace(request, images=images))
    chosen = steps[best_of(_per_step(scores, len(steps) + 1))]
    return Choice(replace(embedding, header={**embedding.header, "best": chosen}), steps, images, scores)


def _per_step(scores: Scores, groups: int) -> dict[str, Tensor]:
    """[1 + steps, images] of each measure, first those of the images without the subject."""
    return {
        name: torch.tensor(values, dtype=torch.float64).view(groups, -1)
        for name, values in scores.values.items()
        if name in ("dino", "clip_i", "clip_t")
    }


def best_of(scores: dict[str, Tensor]) -> int:
    """The index of the best step in the rows of _per_step() but the first: the one most surely more alike than the last
    of those that follow the prompt at least as well, or else the last.
    """
    from scipy.stats import t as student  # ComfyUI brings it

    alike = torch.stack([values[1:] for name, values in scores.items() if name != "clip_t"]).sum(0)
    gain, images = alike - alike[-1], alike.shape[1]
    sure = gain.mean(1)  # one image has no interval
    if images > 1:
        sure = sure - float(student.ppf(0.975, images - 1)) / images**0.5 * gain.std(1)
    if "clip_t" in scores:
        text = scores["clip_t"][1:].mean(1)
        sure = sure.where(text >= text[-1], torch.full_like(sure, -torch.inf))
    best = int(sure.argmax())
    return best if sure[best] > 0 else len(sure) - 1
