"""What masks, latents and VAEs must be for an image: size, proportion, number, channels.

The shape of a single input is checked before, for every node, in inputs.py.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import latent_mask

LARGE = 1536  # px, of the longer side: above what models are made for
SMALLEST = 8  # px, one cell of the latents of most models
OVERSHOOT = 0.5  # beyond 0 to 1: filters do so a little; bytes (0 to 255) and signed images (-1 to 1) go further
BORDER, DOUBT = 0.55, 0.3  # shares of white along the border from which a mask is, or may be, that of surroundings
SAME_PROPORTION = 0.02  # relative: masks and images are cropped and scaled separately, each rounded to whole pixels
log = logging.getLogger("likeness")
PAINT = "paint the subject (white) or disconnect the mask"


def check_image(image: Tensor, name: str = "image") -> None:
    """ValueError for anything but colour images [B, H, W, 3 or more] of finite numbers, SMALLEST pixels or more."""
    if image.ndim != 4 or image.shape[0] == 0 or image.shape[-1] < 3:
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}, expected [batch, height, width, 3], with colour: connect an IMAGE."
        )
    if min(image.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"{name} has {image.shape[2]} x {image.shape[1]} pixels, expected {SMALLEST} or more on each side: connect "
            "a larger image."
        )
    check_range(name, image, "make the image again, with the VAE in fp32 where it was decoded")


def check_finite(name: str, value: Any, remedy: str) -> None:
    """ValueError for anything but a plain tensor of finite numbers, in floating point of 16 bits or more."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not plain or not value.is_floating_point() or value.element_size() == 1:
        given = f"{value.dtype} ({value.layout}, {value.device})" if isinstance(value, Tensor) else "no tensor"
        raise ValueError(f"'{name}' holds {given}, expected plain numbers in fp16, bf16 or fp32: {remedy}.")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"'{name}' holds NaN or infinite numbers, expected finite ones: {remedy}.")


def check_result(name: str, value: Tensor) -> None:
    """RuntimeError for a result without numbers, as a model in fp16 gives it that overflows."""
    if not value.is_nested and not bool(torch.isfinite(value).all()):
        raise RuntimeError(
            f"'{name}' came out with NaN or infinite numbers, expected finite ones: load the model and the VAE in bf16 "
            "or fp32, and check that the prompts come from this model's own text encoder."
        )


def check_range(name: str, value: Tensor, remedy: str) -> None:
    """ValueError for anything but finite numbers from 0 to 1, or a little beyond."""
    check_finite(name, value, remedy)
    low, high = (float(end) for end in value.aminmax())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(f"'{name}' holds numbers from {low:g} to {high:g}, expected 0 to 1: {remedy}.")


def checked_mask(
    mask: Tensor,
    images: int,
    size: tuple[int, int],
    *,
    name: str = "mask",
    empty: str | None = PAINT,
    full: str | None = None,
    subject: bool = False,
) -> Tensor:
    """A MASK [h, w], [1, h, w] or one per image, as [R, h, w] on the CPU, with R = 1 or `images`.

    size: height and width of the image the mask belongs to, or of its latent. empty, full: the remedy for a mask
    without any white, or without any black; None where such a mask is valid. subject: the mask of
    surroundings is turned over (subject_mask). ValueError for a mask that does not fit.
    """
    mask = mask.float().cpu().reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, images):
        raise ValueError(
            f"{len(mask)} masks came with {images} images ('{name}'): give one mask, or one for each image."
        )
    mask = subject_mask(mask, name) if subject else mask
    white = (mask > 0.5).flatten(1)
    if empty and not bool(white.any(1).all()):
        raise ValueError(f"The {name} is empty, expected white where it counts: {empty}.")
    (rows, columns), (height, width) = mask.shape[-2:], size
    slack = max(SAME_PROPORTION, 1 / min(rows, columns, height, width))
    if abs(columns * height - rows * width) > slack * max(columns * height, rows * width):
        raise ValueError(
            f"The {name} has {columns} x {rows} pixels, its image {width} x {height}, which is another proportion: "
            "connect the mask that belongs to that very image."
        )
    if full and bool(white.all()):
        raise ValueError(f"The {name} covers the whole image, expected black where it does not count: {full}.")
    return mask


def subject_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """A mask [R, h, w] of a subject with the masks of its surroundings turned over; the log says which.

    Load Image gives the transparent part of an image as its MASK, which is all but the subject. Such a mask is white
    along most of the border and black in the middle, also where a subject is cut off by an edge of the image.
    """
    white = mask > 0.5
    rows, columns = mask.shape[-2:]
    edges = (white[:, 0], white[:, -1], white[:, :, 0], white[:, :, -1])
    border = torch.cat(edges, 1).float().mean(1)
    middle = white[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4].flatten(1).float().mean(1)
    turned = (border > BORDER) & (middle < 0.5)
    doubtful = (border > DOUBT) & (middle < 0.5) & ~turned
    if bool(turned.any()):
        log.info(
            "'%s' is white along the border and black in the middle, as Load Image gives it for a transparent image: "
            "it is taken for the surroundings and turned over.",
            name,
        )
    if bool(doubtful.any()):
        log.warning(
            "'%s' is black in the middle and partly white along the border: white must be the subject. For a "
            "transparent image of Load Image, put Invert Mask behind its MASK.",
            name,
        )
    return torch.where(turned[:, None, None], 1 - mask, mask)


@dataclass(frozen=True)
class TrainingImages:
    """The training data: latent [B, C, h, w] (video models: [B, C, 1, h, w]) as in a LATENT; mask [B or 1, 1, h, w]
    (likewise) of ones and zeros, or None.
    """

    latent: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class ImageSource:
    """The source of a node's image(s): a LATENT, or an IMAGE with its VAE; and an optional MASK."""

    latent: dict[str, Tensor] | None = None
    image: Tensor | None = None
    vae: Any | None = None
    mask: Tensor | None = None

    def encoded(self, model: Any) -> TrainingImages:
        """The training images, checked against the model; ValueError says what is missing or does not fit."""
        samples = image_latents(model, self._samples())
        check_finite("latent", samples, "encode the image again, with the VAE in fp32")
        samples, size = samples.float().cpu(), (samples.shape[-2], samples.shape[-1])
        if self.mask is None:
            return TrainingImages(samples, None)
        mask = latent_mask(checked_mask(self.mask, len(samples), size, subject=True), *size)
        return TrainingImages(samples, as_latent(mask, samples))

    def _samples(self) -> Tensor:
        if self.latent is not None and self.image is None:
            return self.latent["samples"]
        if self.image is None or self.latent is not None:
            given = "nothing came on 'latent' or 'image'" if self.latent is None else "both came in"
            raise ValueError(f"Connect either a LATENT, or an IMAGE with its VAE; {given}.")
        if self.vae is None:
            raise ValueError(
                "An IMAGE is connected without a VAE: connect the checkpoint's VAE, or encode the image to a LATENT."
            )
        images = self.image[..., :3]
        if max(images.shape[1:3]) > LARGE:
            log.warning(
                "The training image has %d x %d pixels, models are made for 512 to 1024: scale it down (Upscale "
                "Image) before it is learned, or each step takes many times as long.",
                *(images.shape[2], images.shape[1]),
            )
        if getattr(self.vae, "latent_dim", 2) == 2:
            return self.vae.encode(images)
        return torch.cat([self.vae.encode(image[None]) for image in images])  # together they would be a video


def image_latents(model: Any, samples: Tensor) -> Tensor:
    """Latents of images with the number of axes that the model's have: those of video models have frames, here one.

    ValueError for latents of another model, or of a video.
    """
    latent_format = model.get_model_object("latent_format")
    channels, axes = latent_format.latent_channels, getattr(latent_format, "latent_dimensions", 2)
    nested = getattr(samples, "is_nested", False)
    if not nested and axes == 3 and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if nested or samples.ndim != 2 + axes or samples.shape[1] != channels:
        shape = "nested, of several media" if nested else tuple(samples.shape)
        frame = ", 1" if axes == 3 else ""
        raise ValueError(
            f"The latent is {shape}, the model expects [batch, {channels}{frame}, height, width] for images: use its "
            "own VAE."
        )
    if axes == 3 and samples.shape[2] != 1:
        raise ValueError(
            f"The latent holds a video of {samples.shape[2]} frames, expected images of one: encode a single image."
        )
    return samples


def as_latent(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask [B, 1, h, w] with as many axes as a latent."""
    return mask.unsqueeze(2) if latent.ndim == 5 else mask


def check_vae(model: Any, vae: Any) -> None:
    """ValueError when the VAE belongs to another model."""
    channels = model.get_model_object("latent_format").latent_channels
    vae_channels = getattr(vae, "latent_channels", channels)
    if vae_channels != channels:
        raise ValueError(
            f"The VAE's latents have {vae_channels} channels, the model's {channels}: use the model's own VAE."
        )
