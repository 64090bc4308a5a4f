"""Similarity measures: cosine identity, PSNR, LPIPS, ranking.

Images are ComfyUI's: [B, H, W, 3] in 0..1. Masks are [B, H, W] in 0..1, 1 on the subject. Torch only, differentiable
where applicable.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

PSNR_OF_EQUAL = 100.0  # dB; used in place of the infinite PSNR of equal images
LPIPS_EPS = 1e-10
SUBJECT = 0.5  # lowest mask value of a pixel that belongs to the subject


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of the rows of a [B, D] and b [B or 1, D] -> [B] in -1..1. ValueError when widths differ."""
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"Features of {a.shape[-1]} and {b.shape[-1]} numbers cannot be compared: take both from one model."
        )
    return functional.cosine_similarity(a.float(), b.float(), dim=-1)


def psnr(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """10 log10(1 / mean square) in dB -> [B], at most PSNR_OF_EQUAL; the mean is over pixels and channels.

    weight [B or 1, H, W]: of each pixel; the mask for inside, 1 - mask for outside.
    """
    mean = _mean((a.float() - b.float()).square().mean(-1), weight)
    return -10.0 * torch.log10(mean.clamp_min(10.0 ** (-PSNR_OF_EQUAL / 10.0)))


def lpips(a: Sequence[Tensor], b: Sequence[Tensor], heads: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924, equation 1) -> [B], 0 for equal images.

    a, b: the feature maps [B, C_l, h_l, w_l] of the L layers. heads: w_l >= 0, each [C_l].
      d = sum_l mean_hw sum_c w_lc * (a_lc / |a_l| - b_lc / |b_l|)^2
    The channel weight is w_l as in the reference code ("lin" heads), equivalent to w_l^2 in the paper.
    weight [B or 1, H, W]: the mean over h, w becomes a weighted mean, with the weights averaged to each layer's size.
    """
    total = a[0].new_zeros(a[0].shape[0])
    for a_l, b_l, w_l in zip(a, b, heads, strict=True):
        difference = (_unit(a_l) - _unit(b_l)).square()
        distance = (difference * w_l.view(1, -1, 1, 1)).sum(1)
        size = distance.shape[1], distance.shape[2]
        local = None if weight is None else functional.adaptive_avg_pool2d(weight.to(distance), size)
        total = total + _mean(distance, local)
    return total


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """The mean [B] of values [B, H, W], with a weight [B or 1, H, W] of each."""
    if weight is None:
        return values.mean((1, 2))
    weight = weight.to(values).expand(values.shape)
    return (values * weight).sum((1, 2)) / weight.sum((1, 2))


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + LPIPS_EPS)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask [B, h, w] resized with antialiasing, in 0..1."""
    if mask.shape[1:] == (height, width):
        return mask.float()
    resized = functional.interpolate(mask[:, None].float(), (height, width), mode="bilinear", antialias=True)
    return resized[:, 0].clamp(0.0, 1.0)


def subject_crop(images: Tensor, masks: Tensor, size: int, margin: float = 0.06) -> Tensor:
    """The subject on white, cropped to a square and resized -> [B, size, size, 3].

    Identity is measured on these crops: on whole images a matching background would raise the similarity. The square is
    centred on the subject's bounding box and extends beyond it by `margin` of its longer side on every side. images
    [B, H, W, 3], masks [B, H, W]. Differentiable with respect to images, and therefore not clamped: bicubic resizing
    slightly overshoots 0..1. ValueError when a mask has no pixel of 0.5 or more.
    """
    if images.shape[:3] != masks.shape:
        raise ValueError(
            f"A mask of shape {tuple(masks.shape)} does not fit images of shape {tuple(images.shape)}: resize it."
        )
    crops = []
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        rows, columns = (torch.nonzero((mask >= SUBJECT).any(dim)).flatten() for dim in (1, 0))
        if rows.numel() == 0:
            raise ValueError(f"The mask of image {i} is empty (no pixel reaches {SUBJECT}): mark the subject in it.")
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        side = math.ceil(max(bottom - top, right - left) * (1.0 + 2.0 * margin))
        on_white = image * mask[..., None].to(image) + (1.0 - mask[..., None].to(image))
        y, x = (top + bottom - side) // 2, (left + right - side) // 2
        padding = (-x, x + side - image.shape[1], -y, y + side - image.shape[0])  # below 0 it cuts off
        square = functional.pad(on_white.movedim(-1, 0), padding, value=1.0)
        crops.append(functional.interpolate(square[None], (size, size), mode="bicubic", antialias=True))
    return torch.cat(crops).movedim(1, -1)
