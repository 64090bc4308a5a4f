"""The interface through which the pack uses other libraries' vision models."""

from torch import Tensor, nn

from ...preprocess import Preprocess

VisionOutput = tuple[Tensor, Tensor | None, Tensor | None]
"""The embedding [B, D]; tokens of the last and the penultimate layer, or None."""


class Tower(nn.Module):
    """A vision model with an optional text encoder; forward(pixel_values [B, 3, s, s]) -> VisionOutput, differentiable.

    description: the model, and which of its outputs is the embedding. text_missing: why there is no text encoder, as
    the end of a sentence; None when there is one. trained_side: side of the images in the last training stage of a
    DINOv2, for which its position embeddings are made; preprocess has the smaller size specified by its folder.
    """

    preprocess: Preprocess
    description: str
    text_missing: str | None = "it is a vision model only"
    trained_side: int | None = None

    def encode_text(self, texts: list[str]) -> Tensor:
        """Text embeddings [B, D] in the space of the image embeddings."""
        raise NotImplementedError
