"""ComfyUI's encoders and decoders with gradients: the same arithmetic, without rounding, clamping or tiling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..denoiser import Prompt
from ..prompt.conditioning import detached
from .weights import fixed_clone, gradients, load_fully, out_of_place, thawed


@contextlib.contextmanager
def decoding(vae: Any, latent_shape: tuple[int, ...]) -> Iterator[None]:
    """Load the VAE whole and make its decoder differentiable; decode() may be called inside."""
    memory = 4.0 * vae.memory_used_decode(latent_shape, vae.vae_dtype)
    with gradients():
        load_fully([vae.patcher], memory)
        with thawed([vae.first_stage_model]):
            yield


def decode(vae: Any, samples: Tensor) -> Tensor:
    """Images [B, H, W, 3], not clamped, from samples [B, C, h, w] (or [B, C, 1, h, w]) in a LATENT's scale. Call only
    inside decoding().

    Not vae.decode(): it clamps, which has no gradient at saturated pixels, and silently falls back to tiled decoding.
    """
    pixels = vae.first_stage_model.decode(samples.to(vae.device, vae.vae_dtype)).float()
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
    return ((pixels + 1.0) / 2.0).movedim(1, -1)


@contextlib.contextmanager
def text_encoding(clip: Any) -> Iterator[None]:
    """Load the text encoder whole and make it differentiable; encode_tokens() may be called inside."""
    with gradients():
        load_fully([clip.patcher], 0.0)
        with thawed([clip.cond_stage_model]), out_of_place(clip.cond_stage_model):
            yield


def encode_tokens(clip: Any, tokens: dict[str, list[list[tuple[Any, float]]]]) -> Tensor:
    """Text embeddings [1, 77 * k, d] of tokens from clip.tokenize(), in which a tensor [d] may replace a token id."""
    return clip.cond_stage_model.encode_token_weights(tokens)[0]


class TextEncoder:
    """A CLIP for use inside a gradient session, which loads its patcher; encodes like the stock Text Encode node."""

    def __init__(self, clip: Any) -> None:
        self._clip, self.patcher = clip, fixed_clone(clip.patcher)

    def tokens(self, text: str) -> Any:
        """The prompt's tokens, for encode()."""
        return detached(self._clip.tokenize(text))

    def encode(self, tokens: Any) -> Prompt:
        """Token embeddings and pooled vector, with gradients to the encoder's weights."""
        model = self.patcher.model
        model.reset_clip_options()
        if self._clip.layer_idx is not None:
            model.set_clip_options({"layer": self._clip.layer_idx})
        model.set_clip_options({"execution_device": self.patcher.load_device})  # newer ComfyUI asks for it
        context, pooled = model.encode_token_weights(tokens)[:2]
        return Prompt(context, pooled)
