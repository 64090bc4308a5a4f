"""What a vision model of another library looks like to the rest of the pack."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...preprocess import Preprocess


@dataclass(frozen=True)
class Seen:
    """What a model sees in images. embedding [B, D]; tokens of the last layer and of the one before, or None."""

    embedding: Tensor
    last: Tensor | None
    penultimate: Tensor | None


class Tower(nn.Module):
    """A vision model, with or without a text encoder. forward(pixel_values [B, 3, s, s]) -> Seen, differentiable.

    description: which model, and which of its outputs is the embedding. text_missing: why there is no text encoder, as
    the end of a sentence; None when there is one. trained_side: of the images that a DINOv2 was trained on last, and
    its position table is for; preprocess has what its folder says, which is smaller.
    """

    preprocess: Preprocess
    description: str
    text_missing: str | None = "it is a vision model only"
    trained_side: int | None = None

    def encode_text(self, texts: list[str]) -> Tensor:
        """Text embeddings [B, D] in the space of the image embeddings."""
        raise NotImplementedError
