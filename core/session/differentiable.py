"""ComfyUI's encoders and decoders with gradients: the same arithmetic, without rounding, clamping or tiling."""

from typing import Any

from torch import Tensor

from ..denoiser import Prompt
from ..prompt.conditioning import detached
from .weights import fixed_clone


def decode(vae: Any, samples: Tensor) -> Tensor:
    """Images [B, H, W, 3], not clamped, from samples [B, C, h, w] (or [B, C, 1, h, w]) in a LATENT's scale. Call only
    inside of a session that has loaded the VAE.

    Not vae.decode(): it clamps, which has no gradient at saturated pixels, and silently falls back to tiled decoding.
    """
    pixels = vae.first_stage_model.decode(samples.to(vae.device, vae.vae_dtype)).float()
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
    return ((pixels + 1.0) / 2.0).movedim(1, -1)


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
