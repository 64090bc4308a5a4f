"""The background of an image, outside a mask, which editing preserves."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...prompt.conditioning import detached
from ...session.images import checked_mask
from ..siso import Term, background_error

NOTHING_CHANGES = (
    "paint what is to become the subject (right-click the image, Open in MaskEditor), give the detector another word, "
    "or disconnect image and mask"
)
NOTHING_KEPT = "paint the subject only, so that a background is left to keep, or disconnect image and mask"


@dataclass(frozen=True)
class Background:
    """An image [1, H, W, 3] to preserve outside a mask [1, h, w] of the same aspect ratio, for editing."""

    image: Tensor
    mask: Tensor
    weight: float

    def check(self, vae: Any, latent: Tensor) -> None:
        """ValueError when the image does not have the size that a latent [1, C, h, w] decodes to, or the mask does not
        fit the image, or leaves nothing to preserve or nothing to change.
        """
        height, width = self.image.shape[1:3]
        cell = vae.spacial_compression_decode()
        size = (latent.shape[-2] * cell, latent.shape[-1] * cell)
        if len(self.image) != 1 or (height, width) != size:
            raise ValueError(
                f"The image to keep is {width} x {height} ({len(self.image)} of them), and images of "
                f"{size[1]} x {size[0]} are made: scale it to that (ImageScale), as it was before it was encoded."
            )
        checked_mask(self.mask, 1, (height, width), empty=NOTHING_CHANGES, full=NOTHING_KEPT)
        outside = self.outside()
        if not bool(outside.any()) or bool(outside.all()):  # scaling removed the mask's last pixels
            raise ValueError(
                f"At {width} x {height} pixels the mask is {'empty' if bool(outside.all()) else 'full'}, expected some "
                "of both: paint larger areas, on the very image."
            )

    def outside(self) -> Tensor:
        """Ones and zeros [1, 1, H, W] at the image's size, 1 on the background."""
        mask = detached(self.mask).float().reshape(1, 1, *self.mask.shape[-2:])
        size = self.image.shape[1:3]
        if mask.shape[-2:] != size:
            mask = F.interpolate(mask, size, mode="bilinear", antialias=True)
        return (mask <= 0.5).float()

    def term(self) -> Term:
        """The loss outside the mask, computed on the images' device, since the VAE's may differ from the model's."""
        source = detached(self.image)[..., :3].movedim(-1, 1)
        mask = 1 - self.outside()

        def loss(image: Tensor) -> Tensor:
            return self.weight * background_error(image, source.to(image.device), mask.to(image.device))

        return loss


def background(image: Tensor | None, mask: Tensor | None, weight: float) -> Background | None:
    """The background to preserve; None without image and mask. ValueError when one of the two is missing."""
    if (image is None) != (mask is None):
        connected, missing = ("An image", "a mask") if mask is None else ("A mask", "an image")
        raise ValueError(f"{connected} was connected without {missing}: connect both to keep a background, or neither.")
    return None if image is None or mask is None else Background(image, mask, weight)
