"""The LIKENESS_SIMILARITY: what a generated picture is to be like, and to which vision models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..conditioning import detached
from ..siso import Term, unlikeness
from .describe import describe
from .vision import features, preprocess_of


@dataclass(frozen=True)
class Part:
    """One vision model (a CLIP_VISION), how much it counts, and the subject's pictures [N, H, W, 3]."""

    vision: Any
    weight: float
    references: Tensor

    def term(self) -> Term:
        """Its loss; inside a session that has loaded the model."""
        prepared = replace(preprocess_of(self.vision), published=True)
        with torch.no_grad():
            wanted = features(self.vision, detached(self.references), preprocess=prepared).float()

        def loss(picture: Tensor) -> Tensor:
            return self.weight * unlikeness(
                features(self.vision, picture.movedim(1, -1), preprocess=prepared).float(), wanted
            )

        return loss

    def described(self) -> Any:
        """All that decides the loss, for the key of a run."""
        return [describe(self.vision.patcher), self.weight, self.references]


@dataclass(frozen=True)
class Similarity:
    """The sum of its parts."""

    parts: tuple[Part, ...]

    @property
    def patchers(self) -> list[Any]:
        """The vision models' ModelPatchers, each once."""
        found = {id(part.vision.patcher): part.vision.patcher for part in self.parts}
        return list(found.values())

    def and_also(self, part: Part) -> Similarity:
        """With one part more."""
        return Similarity((*self.parts, part))
