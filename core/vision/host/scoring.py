"""Score a batch of images with the connected models: checks first, then measures, ranking and a report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

from ...session import folders
from ...session.images import checked_mask
from ...session.weights import load_fully
from .. import measures
from .extras.lpips_files import SMALLEST, Lpips, load_lpips
from .vision import describe, embed, preprocess_of, text_missing

OUTSIDE = 0.05  # mask values below this are outside the subject: a soft edge belongs to the edit
NOT_MEASURED = -1.0  # below the cosine similarity of real images; the other measures are never negative
LPIPS_BYTES_PER_PIXEL = 2000.0  # activations of both images, for ComfyUI's memory management
TITLES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "psnr": "PSNR", "lpips": "LPIPS"}
UNITS = {"psnr": " dB"}
OVERALL = "overall"
RANKINGS = (OVERALL, "identity", *TITLES)
CROPPED, WHOLE = "subject crops on white", "whole images"


@dataclass(frozen=True)
class Request:
    """What to measure. Images [B, H, W, C], masks [B, H, W] (1 on the subject); lpips: path of the heads file.

    all_references: identity is the mean over any number of references, as in the papers, instead of with one of them.
    names: of the images, separated by commas.
    """

    images: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    reference_mask: Tensor | None = None
    prompt: str = ""
    dino: Any | None = None
    clip: Any | None = None
    lpips: Path | None = None
    rank_by: str = OVERALL
    all_references: bool = False
    names: str = ""

    @property
    def several(self) -> bool:
        """Whether an image is compared with more than one reference."""
        return self.all_references and self.reference is not None and self.reference.shape[0] > 1

    @property
    def same_size(self) -> bool:
        """Whether an image can be compared with its reference pixel by pixel."""
        same = self.reference is not None and self.reference.shape[1:3] == self.images.shape[1:3]
        return same and not self.several

    def measured(self) -> list[str]:
        """The measures that this request's inputs allow, in the order of TITLES."""
        identity = self.reference is not None
        available = {
            "dino": identity and self.dino is not None,
            "clip_i": identity and self.clip is not None,
            "clip_t": bool(self.prompt.strip()),
            "psnr": self.same_size,
            "lpips": self.lpips is not None,
        }
        return [name for name, yes in available.items() if yes]


@dataclass
class Scores:
    """values: one number per image for each measure. order: image indices, best first. rule: how they are ranked."""

    values: dict[str, list[float]]
    order: list[int]
    rule: str
    models: list[str] = field(default_factory=list)  # the measures taken, each with its model
    notes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by name: what learning took

    @property
    def shown(self) -> list[int]:
        """The images in the order of the sheet: named ones have the best first."""
        return self.order if self.names else sorted(self.order)

    @property
    def best(self) -> int:
        return self.order[0]

    def of_best(self, name: str) -> float:
        """The best image's value; NOT_MEASURED if there is none."""
        return self.values[name][self.best] if name in self.values else NOT_MEASURED

    def lines(self, image: int) -> list[str]:
        name = self.names[image] if self.names else f"image {image}"
        title = name + (" (best)" if image == self.best and len(self.order) > 1 else "")
        learned = [f"learned in {self.seconds[name]:.0f} s"] if name in self.seconds else []
        numbers = (f"{TITLES[n]} {_number(n, v[image])}{UNITS.get(n, '')}" for n, v in self.values.items())
        return [title, *numbers, *learned]

    def report(self) -> str:
        """A table with one row per image, the order, the models, and the measures not taken."""
        names = self.names or list(map(str, range(len(self.order))))
        width = max(7, *map(len, names))
        rows = [f"{'image':>{width}}" + "".join(f"{TITLES[name]:>9}" for name in self.values)]
        for i in self.shown:
            numbers = "".join(f"{_number(name, values[i]):>9}" for name, values in self.values.items())
            rows.append(f"{names[i]:>{width}}{numbers}" + ("  best" if i == self.best else ""))
        missing = [TITLES[name] for name in TITLES if name not in self.values]
        order = f"order: {', '.join(names[i] for i in self.order)} (by {self.rule})"
        unmeasured = [f"not measured: {', '.join(missing)}"] if missing else []
        learned = [f"{name}: learned in {seconds:.1f} s" for name, seconds in self.seconds.items()]
        return "\n".join([*rows, order, *self.models, *unmeasured, *learned, *self.notes])


def _number(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.4f}"


def check(request: Request) -> None:
    """ValueError, with the remedy, for a request that cannot be scored."""
    if not request.several:
        _check_count("reference images", request.reference, "images", request.images)
    _check_count("masks", request.mask, "images", request.images)
    _check_count("reference masks", request.reference_mask, "reference images", request.reference)
    prompt = request.prompt.strip()
    if request.dino is not None and request.reference is None:
        raise ValueError("A dino model is connected without a reference: connect the subject's image to reference.")
    if request.clip is not None and request.reference is None and not prompt:
        raise ValueError("A clip model is connected without anything to compare with: give a reference or a prompt.")
    if request.reference_mask is not None and request.reference is None:
        raise ValueError("A reference_mask is connected without a reference: connect the image it belongs to.")
    if prompt and request.clip is None:
        raise ValueError(
            "A prompt was given without a clip model: connect one with a text encoder, or empty the prompt."
        )
    no_text = text_missing(request.clip) if prompt else None
    if no_text:
        raise ValueError(
            f"{describe(request.clip)} cannot score the prompt, as {no_text}: connect another or empty it."
        )
    _check_lpips(request)
    names, images = _names(request), len(request.images)
    if names and len(names) != images:
        raise ValueError(f"{len(names)} names were given for {images} images: give one for each, separated by commas.")
    measured = request.measured()
    if not measured:
        raise ValueError(
            "There is nothing to measure: connect a reference of the same size, or a model with its input."
        )
    possible = {OVERALL, *measured} | ({"identity"} if {"dino", "clip_i"} & set(measured) else set())
    if request.rank_by not in possible:
        choices = ", ".join(name for name in RANKINGS if name in possible)
        raise ValueError(f"rank_by is {request.rank_by}, which is not measured here: choose one of {choices}.")


def _names(request: Request) -> list[str]:
    return [name.strip() for name in request.names.split(",")] if request.names.strip() else []


def _check_count(name: str, batch: Tensor | None, other: str, expected: Tensor | None) -> None:
    if batch is not None and expected is not None and batch.shape[0] not in (1, expected.shape[0]):
        raise ValueError(
            f"{batch.shape[0]} {name} were given for {expected.shape[0]} {other}: give one for all, or one for each."
        )


def _check_lpips(request: Request) -> None:
    if request.lpips is None:
        return
    if request.reference is None:
        raise ValueError("LPIPS was chosen without a reference: connect one to compare with, or set lpips to none.")
    height, width = request.images.shape[1:3]
    if request.several:
        raise ValueError(
            f"LPIPS was chosen with {request.reference.shape[0]} references for each image, expected one: set lpips to "
            "none, or all_references off."
        )
    if not request.same_size:
        rows, columns = request.reference.shape[1:3]
        raise ValueError(
            f"The images are {width}x{height} and the reference is {columns}x{rows}: LPIPS needs one size, so "
            "resize one of them, or set lpips to none."
        )
    if min(height, width) < SMALLEST:
        raise ValueError(f"The images are {width}x{height}: LPIPS needs at least {SMALLEST} pixels on each side.")


def score(request: Request) -> Scores:
    """Check, measure and rank. Everything is checked and loaded before anything is computed."""
    check(request)
    images = request.images[..., :3].float().cpu()
    reference = None if request.reference is None else request.reference[..., :3].float().cpu()
    mask = _fit_mask(request.mask, images, "mask")
    reference_mask = _fit_mask(request.reference_mask, reference, "reference_mask")
    outside = _outside(mask, reference_mask, request)
    lpips = None if request.lpips is None else load_lpips(request.lpips, folders.roots(folders.LPIPS))

    found: dict[str, tuple[Tensor, str]] = {}  # of each measure, its values and the model
    for name, vision in (("dino", request.dino), ("clip_i", request.clip)):
        if vision is not None and reference is not None:
            a, b = _embed(vision, images, mask), _embed(vision, reference, reference_mask)
            pairs = [measures.cosine(a, row) for row in (b.split(1) if request.several else [b])]
            found[name] = torch.stack(pairs).mean(0), f"{describe(vision)}, on {WHOLE if mask is None else CROPPED}"
    if request.clip is not None and request.prompt.strip():
        text = request.clip.encode_text([request.prompt.strip()]).cpu()
        found["clip_t"] = measures.cosine(embed(request.clip, images), text), f"{describe(request.clip)}, on {WHOLE}"
    if reference is not None and request.same_size and (outside is None or _has_outside(outside)):
        region = "over the whole image" if outside is None else "outside the mask"
        found["psnr"] = measures.psnr(images, reference, outside), f"against the reference, {region}"
        if lpips is not None:
            distances = _lpips(lpips, images, reference.expand(images.shape), outside)
            found["lpips"] = distances, f"{lpips.description}, {region}"
    table = {name: found[name][0].tolist() for name in TITLES if name in found}
    models = [f"{TITLES[name]}: {model}" for name, (_, model) in found.items()]
    totals, rule = ranking(table, request.rank_by)
    notes = _notes(request, outside)
    identity = [name for name in ("dino", "clip_i") if request.several and name in found]
    if reference is not None and identity:
        numbers = ", ".join(f"{TITLES[name]} {_number(name, float(found[name][0].mean()))}" for name in identity)
        notes.append(f"mean over all {len(images)} x {len(reference)} pairs: {numbers}")
    order = sorted(range(len(totals)), key=totals.__getitem__, reverse=True)  # equal ones keep their order
    return Scores(table, order, rule, models, notes, _names(request))


def _fit_mask(mask: Tensor | None, images: Tensor | None, name: str) -> Tensor | None:
    """One mask per image, at the images' size. ValueError for an empty mask."""
    if mask is None or images is None:
        return None
    size = (images.shape[1], images.shape[2])
    resized = measures.resize_mask(checked_mask(mask, len(images), size, name=name, empty=None, subject=True), *size)
    empty = [i for i, each in enumerate(resized) if not bool((each >= measures.SUBJECT).any())]
    if empty:
        raise ValueError(f"{name} {empty[0]} is empty: mark the subject white in it, or disconnect it.")
    return resized.expand(images.shape[:3])


def _embed(vision: Any, images: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return embed(vision, images)
    return embed(vision, measures.subject_crop(images, mask, preprocess_of(vision).size), crop=False)


def _outside(mask: Tensor | None, reference_mask: Tensor | None, request: Request) -> Tensor | None:
    """1 outside the subjects of both the image and the reference; None without masks or without a comparison.

    ValueError when nothing lies outside although the request needs it.
    """
    if not request.same_size or (mask is None and reference_mask is None):
        return None
    shape = request.images.shape[:3]
    subject = torch.stack([m.expand(shape) for m in (mask, reference_mask) if m is not None]).amax(0)
    outside = (subject < OUTSIDE).float()
    others = set(request.measured()) - {"psnr", "lpips"}
    if not _has_outside(outside) and (request.lpips is not None or request.rank_by == "psnr" or not others):
        raise ValueError(
            "A mask covers a whole image, so nothing lies outside to compare by PSNR or LPIPS: mark only the subject."
        )
    return outside


def _has_outside(outside: Tensor) -> bool:
    return bool((outside.sum((1, 2)) >= 1.0).all())


def _lpips(model: Lpips, images: Tensor, reference: Tensor, outside: Tensor | None) -> Tensor:
    """LPIPS per image. Inside the subject the images are first made equal, since deep layers' receptive fields extend
    into it from outside.
    """
    device = mm.get_torch_device()
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    load_fully([patcher], LPIPS_BYTES_PER_PIXEL * images[0, ..., 0].numel())
    if outside is not None:
        images = reference + outside[..., None] * (images - reference)
    distances = []
    with torch.no_grad():
        for i in range(len(images)):
            mm.throw_exception_if_processing_interrupted()
            one = (None if each is None else each[i : i + 1].to(device) for each in (images, reference, outside))
            distances.append(model(*one).cpu())
    return torch.cat(distances)


def _notes(request: Request, outside: Tensor | None) -> list[str]:
    notes = []
    identity = request.reference is not None and (request.dino is not None or request.clip is not None)
    if identity and request.mask is not None and request.reference_mask is None:
        notes.append("the reference was seen whole: connect reference_mask unless it is already cut out on white")
    if identity and request.mask is None and request.reference_mask is not None:
        notes.append("the images were seen whole: connect mask, so that only the subject is compared")
    if request.reference is None and request.mask is not None:
        notes.append("mask was not used, since there is no reference")
    if request.several:
        notes.append("PSNR and LPIPS need one reference for each image")
    elif request.reference is not None and not request.same_size:
        notes.append("PSNR and LPIPS need a reference of the same size")
    if outside is not None and not _has_outside(outside):
        notes.append("PSNR was not measured, since a mask covers a whole image")
    return notes


def ranking(values: dict[str, list[float]], rank_by: str) -> tuple[list[float], str]:
    """(one number per image, higher is better; the rule in words). rank_by: one of the RANKINGS that are measured."""
    identity = [name for name in ("dino", "clip_i") if name in values]
    if not identity and rank_by == OVERALL:
        rank_by = "clip_t" if "clip_t" in values else "psnr"
    if rank_by in TITLES:
        sign = -1.0 if rank_by == "lpips" else 1.0
        return [sign * v for v in values[rank_by]], TITLES[rank_by] + (", lowest first" if sign < 0 else "")
    total = [sum(row) / len(identity) for row in zip(*(values[name] for name in identity), strict=True)]
    rule = " and ".join(TITLES[name] for name in identity)
    rule = f"the mean of {rule}" if len(identity) == 2 else rule
    if rank_by == "identity" or "clip_t" not in values:
        return total, rule
    return [a + b for a, b in zip(total, values["clip_t"], strict=True)], f"{rule}, plus CLIP-T"
