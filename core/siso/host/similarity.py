"""The LIKENESS_SIMILARITY: what a generated image is to be like, and to which vision models."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...prompt.conditioning import detached
from ...session.describe import describe
from ...session.images import check_image, checked_mask
from ...vision.host.vision import features, published_preprocess
from ...vision.measures import resize_mask, subject_crop
from ..siso import Term, unlikeness

log = logging.getLogger("likeness")
LOST = 0.1  # share of an image's length that a centre crop may lose unsaid


@dataclass(frozen=True)
class Part:
    """One vision model (a CLIP_VISION), how much it counts, and the subject's images [N, H, W, 3]."""

    vision: Any
    weight: float
    references: Tensor

    def term(self) -> Term:
        """Its loss; inside a session that has loaded the model."""
        prepared = published_preprocess(self.vision)
        with torch.no_grad():
            wanted = features(self.vision, detached(self.references), preprocess=prepared).float()

        def loss(image: Tensor) -> Tensor:
            return self.weight * unlikeness(
                features(self.vision, image.movedim(1, -1), preprocess=prepared).float(), wanted
            )

        return loss

    def described(self) -> Any:
        """All that decides the loss, for the key of a run."""
        return [describe(self.vision.patcher), asdict(published_preprocess(self.vision)), self.weight, self.references]


def part_of(vision: Any, weight: float, images: Tensor, mask: Tensor | None = None) -> Part:
    """A Part of the subject's images [N, H, W, 3 or 4], seen as published: whole, cut to the central square.

    mask [1 or N, h, w]: the subject is put on white and cut out, with nothing of it lost. ValueError for images or
    masks that hold nothing; a warning when the central square loses a good part of an image.
    """
    check_image(images)
    images = images[..., :3].float().cpu()
    count, height, width = images.shape[:3]
    if mask is not None:
        sized = resize_mask(checked_mask(mask, count, (height, width)), height, width)
        size = published_preprocess(vision).size
        return Part(vision, weight, subject_crop(images, sized.expand(count, -1, -1), size).clamp(0, 1))
    if 1 - min(height, width) / max(height, width) > LOST:
        log.warning(
            "Only the central %d x %d pixels of the subject's %d x %d image are seen (as published). If the subject "
            "reaches the border, cut the image square around it, or connect its mask to Likeness To Images.",
            *(min(height, width), min(height, width), width, height),
        )
    return Part(vision, weight, images)


@dataclass(frozen=True)
class Similarity:
    """The sum of its parts."""

    parts: tuple[Part, ...]

    @property
    def visions(self) -> list[Any]:
        """The vision models, each once."""
        return list({id(part.vision.patcher): part.vision for part in self.parts}.values())

    @property
    def patchers(self) -> list[Any]:
        """Their ModelPatchers."""
        return [vision.patcher for vision in self.visions]

    def and_also(self, part: Part) -> Similarity:
        """With one part more."""
        return Similarity((*self.parts, part))
