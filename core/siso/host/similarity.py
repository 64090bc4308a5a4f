"""The LIKENESS_SIMILARITY: reference images, and the vision models that compare a generated image with them."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...prompt.conditioning import detached
from ...session.describe import describe
from ...session.images import checked_mask
from ...vision.host.vision import features, published_preprocess
from ...vision.measures import resize_mask, subject_crop
from ..siso import Term, similarity_loss

log = logging.getLogger("likeness")
CROP_TOLERANCE = 0.1  # share of an image's length that a centre crop may lose without a warning


@dataclass(frozen=True)
class SimilarityPart:
    """One vision model (a CLIP_VISION), its weight, and the subject's images [N, H, W, 3]."""

    vision: Any
    weight: float
    references: Tensor

    def term(self) -> Term:
        """Its loss; call it inside a session that has loaded the model."""
        preprocess = published_preprocess(self.vision)
        with torch.no_grad():
            target = features(self.vision, detached(self.references), preprocess=preprocess).float()

        def loss(image: Tensor) -> Tensor:
            return self.weight * similarity_loss(
                features(self.vision, image.movedim(1, -1), preprocess=preprocess).float(), target
            )

        return loss

    def key_parts(self) -> Any:
        """Everything that determines the loss, for the key of a run."""
        return [describe(self.vision.patcher), asdict(published_preprocess(self.vision)), self.weight, self.references]


def similarity_part(vision: Any, weight: float, images: Tensor, mask: Tensor | None = None) -> SimilarityPart:
    """A SimilarityPart of the subject's images [N, H, W, 3 or 4], preprocessed as published: the central square.

    mask [1 or N, h, w]: the subject is cut out whole and put on white. ValueError for an empty mask; a warning when
    the central square loses much of an image.
    """
    images = images[..., :3].float().cpu()
    count, height, width = images.shape[:3]
    if mask is not None:
        resized = resize_mask(checked_mask(mask, count, (height, width), subject=True), height, width)
        size = published_preprocess(vision).size
        return SimilarityPart(vision, weight, subject_crop(images, resized.expand(count, -1, -1), size).clamp(0, 1))
    if 1 - min(height, width) / max(height, width) > CROP_TOLERANCE:
        log.warning(
            "Only the central %d x %d pixels of the subject's %d x %d image are seen (as published). If the subject "
            "reaches the border, cut the image square around it, or connect its mask to Likeness To Images.",
            *(min(height, width), min(height, width), width, height),
        )
    return SimilarityPart(vision, weight, images)


@dataclass(frozen=True)
class Similarity:
    """A weighted sum of similarities."""

    parts: tuple[SimilarityPart, ...]

    @property
    def visions(self) -> list[Any]:
        """The vision models, without duplicates."""
        return list({id(part.vision.patcher): part.vision for part in self.parts}.values())
