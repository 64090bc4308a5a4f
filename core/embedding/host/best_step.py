"""Choose the step of an embedding by images of a prompt that it was not trained with.

HiPer's authors pick the step by eye (README: 'choose from 1000 to 1500'). Here images of the new prompt are drawn at
every saved step, from the same noise, and scored: the most alike step is chosen among those that follow the prompt at
least as well as the last one, so that likeness is not bought with editability.
"""

from __future__ import annotations

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
        """The index of the best step's first image."""
        return (1 + self.steps.index(self.step)) * (len(self.images) // (len(self.steps) + 1))

    def means(self) -> dict[str, list[float]]:
        """The mean score of the images without the subject, then of each step."""
        return _means(self.scores, len(self.steps) + 1)

    def captions(self) -> list[list[str]]:
        """For each image what it shows, and its scores."""
        each = len(self.images) // (len(self.steps) + 1)
        names = ["without", *(f"step {step}" for step in self.steps)]
        return [[names[i // each], *self.scores.lines(i)[1:]] for i in range(len(self.images))]

    def report(self) -> str:
        """What the best step gained in plain words, then a table with one row per step."""
        means = self.means()
        best = 1 + self.steps.index(self.step)
        words = {"dino": "alike", "clip_i": "alike (CLIP)", "clip_t": "follows the prompt"}
        gains = [f"{words[name]}: {values[0]:.2f} -> {values[best]:.2f}" for name, values in means.items()]
        lines = [f"best step: {self.step}", *gains]
        lines.append("    step" + "".join(f"{TITLES[name]:>9}" for name in means))
        for row, name in enumerate(["without", *map(str, self.steps)]):
            numbers = "".join(f"{values[row]:>9.4f}" for values in means.values())
            lines.append(f"{name:>8}{numbers}" + ("  best" if row == best else ""))
        return "\n".join([*lines, *(f"{TITLES[name]}: {model}" for name, model in self.scores.models.items())])


def choose_step(model: Any, embedding: Embedding, trial: Trial, request: Request, node_id: str | None = None) -> Choice:
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
    images = trial.sampling.drawn(model, [trial.prompt, *placed], tuple(shape), trial.images, node_id)
    scores = score(replace(request, images=images))
    chosen = steps[best_of(_means(scores, len(steps) + 1))]
    return Choice(replace(embedding, header={**embedding.header, "best": chosen}), steps, images, scores)


def _means(scores: Scores, groups: int) -> dict[str, list[float]]:
    return {
        name: torch.tensor(values, dtype=torch.float64).view(groups, -1).mean(1).tolist()
        for name, values in scores.values.items()
        if name in ("dino", "clip_i", "clip_t")
    }


def best_of(means: dict[str, list[float]]) -> int:
    """The index of the best step in lists that begin with the images without the subject: the most alike of those that
    follow the prompt at least as well as the last; of equal ones the last.
    """
    identity = [values[1:] for name, values in means.items() if name != "clip_t"]
    alike = [sum(each) for each in zip(*identity, strict=True)]
    text = means.get("clip_t", [0.0] * (1 + len(alike)))[1:]
    return max((i for i in range(len(alike)) if text[i] >= text[-1]), key=lambda i: (alike[i], i))
