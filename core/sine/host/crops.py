"""Training images as latents: whole, or as patches with their boxes, encoded in advance."""

from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ...denoiser import latent_mask
from ...session.images import as_latent, checked_mask, image_latents
from ..fine_tune import Samples
from ..patches import Box, box_of, check_size, cut, resize_to_square


@dataclass(frozen=True)
class CropSettings:
    """How samples are made. resolution: side of the training square in pixels; cells: per side of the grid, 0 for no
    patches; crops: patches prepared in advance; whole_image: probability of the whole image instead of a patch.
    """

    resolution: int
    cells: int = 0
    crops: int = 1000
    whole_image: float = 0.0


def check_images(image: Tensor, mask: Tensor | None, settings: CropSettings) -> Tensor | None:
    """The mask of the subject. ValueError for images and masks that cannot be made into samples."""
    if settings.cells:
        check_size(image.shape[1], image.shape[2], settings.cells)
    return None if mask is None else checked_mask(mask, len(image), (image.shape[1], image.shape[2]), subject=True)


def make_samples(
    model: Any, vae: Any, image: Tensor, mask: Tensor | None, settings: CropSettings, seed: int, steps: int
) -> Samples:
    """Samples for `steps` updates, at the scale of a LATENT: a sequence of patches, or the whole images.

    image [B, H, W, 3] in 0..1, mask [B or 1, H, W]. The i-th sample comes from image i % B. ValueError when the VAE is
    not the model's.
    """
    cell = vae.spacial_compression_encode()
    size = settings.cells * cell or settings.resolution
    squares = resize_to_square(image[..., :3].cpu().movedim(-1, 1), size)
    masks = None if mask is None else resize_to_square(mask.cpu().reshape(-1, 1, *mask.shape[-2:]), size)
    count = settings.crops if settings.cells else image.shape[0]
    boxes: list[Box] = []
    latents, latent_masks = [], []
    for i in range(min(count, steps)):
        mm.throw_exception_if_processing_interrupted()
        square = squares[i % image.shape[0]][None]
        patch_mask = None if masks is None else masks[i % masks.shape[0]][None]
        if settings.cells:
            boxes.append(_box(patch_mask, settings, seed, i, cell))
            square = cut(square, boxes[-1], cell, settings.resolution)
            patch_mask = None if patch_mask is None else cut(patch_mask, boxes[-1], cell, settings.resolution)
        # One at a time: in a batch the last bits of a latent depend on its neighbours.
        latent = image_latents(model, vae.encode(square.movedim(1, -1)))
        if not bool(torch.isfinite(latent).all()):
            raise ValueError("The VAE gave NaN or infinite numbers: load it in fp32 (--fp32-vae) or use a fixed one.")
        latents.append(latent.float().cpu())
        if patch_mask is not None:
            latent_masks.append(as_latent(latent_mask(patch_mask, *latents[-1].shape[-2:]), latents[-1]))
    return Samples(
        torch.cat(latents),
        torch.tensor(boxes, dtype=torch.int64) if boxes else None,
        torch.cat(latent_masks) if latent_masks else None,
    )


def _box(mask: Tensor | None, settings: CropSettings, seed: int, index: int, cell: int) -> Box:
    def shows(box: Box) -> bool:
        return mask is None or bool((cut(mask, box, cell, settings.resolution) > 0.5).any())

    return box_of(seed, index, settings.cells, settings.whole_image, shows)
