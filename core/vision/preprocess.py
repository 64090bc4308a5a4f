"""Preprocess ComfyUI images for vision models: resize, centre crop, normalise; differentiable, without rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_SIDE = 4096  # pixels of a vision model's input
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of one model.

    size: side of the square input, in pixels. shorter_side: length of the shorter side before the centre crop to
    `size`; None squashes the image to the square instead. mode: "bicubic" or "bilinear". published: as in SISO's
    script, without antialiasing, and with the longer side truncated to whole pixels instead of rounded.
    """

    size: int
    shorter_side: int | None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: str = "bicubic"
    published: bool = False

    def __call__(self, pixels: Tensor, crop: bool = True) -> Tensor:
        """[B, H, W, 3 or 4] in 0..1 (alpha is dropped) -> [B, 3, size, size], normalised. crop=False squashes.

        Unlike ComfyUI's encode_image, this neither clamps nor rounds to 8 bits, since both have zero gradient; values
        differ from it by up to half a grey level.
        """
        x = pixels[..., :3].movedim(-1, 1).float()
        height, width = x.shape[2:]
        if crop and self.shorter_side is not None:
            to_integer = int if self.published else round
            longer = to_integer(self.shorter_side * max(height, width) / min(height, width))
            shorter, longer = max(self.shorter_side, self.size), max(longer, self.size)
            target = (shorter, longer) if height <= width else (longer, shorter)
        else:
            target = (self.size, self.size)
        if (height, width) != target:
            x = functional.interpolate(x, target, mode=self.mode, antialias=not self.published, align_corners=False)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        x = x[:, :, top : top + self.size, left : left + self.size]
        return (x - torch.tensor(self.mean).to(x).view(3, 1, 1)) / torch.tensor(self.std).to(x).view(3, 1, 1)
