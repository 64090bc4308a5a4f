"""Folders of subject images for training EZIGen's adapter (Duan et al. 2024, arXiv 2409.08091).

    <folder>/<subject>/<name>.png    an image; or .jpg, .webp
                       <name>.txt    its caption; images with a caption are training targets
                       <name>.mask.png  white where the subject is; images with a mask serve as subject images
                       class.txt     the class noun, "dog"; default: the folder's name without trailing digits

A sample is one captioned image and the subject cut out of one to four other images of it, each alone on a white square.
For a subject with a single image it is that image's own cut-out, as the published training does with COCO. Without a
mask file, an image's transparency is its mask.

Deviations from the published data, each with its reason: the target is cropped to a square around its subject instead
of squeezed into one, which would teach the adapter to distort; samples have one to four subject images, while the
reference code fills up with gray ones.

Folders may come from anywhere: links that lead out of them are not followed, and unreadable files are skipped and
counted.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ..fit.fit import step_generator
from ..vision.measures import SUBJECT, subject_crop
from .train import MAX_SUBJECTS

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
CAPTION, MASK, CLASS = ".txt", ".mask.png", "class.txt"
MAX_TEXT = 16_384  # bytes of a caption
SAME_SHAPE = 0.02  # relative: tolerance between the aspect ratios of mask and image
EXPECTED = "<folder>/<subject>/<name>.png with <name>.txt (its caption) and <name>.mask.png (white on the subject)"
T = TypeVar("T")


@dataclass(frozen=True)
class ImageEntry:
    """One image and its files. has_mask: it has a mask file, or transparency that serves as one (mask is then None)."""

    path: Path
    subject: str
    class_noun: str
    caption: str
    mask: Path | None
    has_mask: bool

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.path.name}"


@dataclass(frozen=True)
class Pair:
    """A sample: target [3, S, S] in 0..1; subjects [R, 3, S, S] in 0..1 on white, each with its class noun."""

    target: Tensor
    caption: str
    subjects: Tensor
    classes: list[str]


def subject_prompt(class_noun: str) -> str:
    """The prompt for encoding a subject image, as published."""
    return f"a photo of a {class_noun}."


def index_of(seed: int, number: int, count: int) -> int:
    """Which of `count` images sample `number` of the run uses; every pass has its own random order.

    It depends on nothing else, so that neither the number of processes nor a resume changes it.
    """
    return _order(seed, number // count, count)[number % count]


def pair_generator(seed: int, number: int) -> torch.Generator:
    """The generator that draws the subject images of sample `number`."""
    return step_generator(seed, number, "pair")


@functools.lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return torch.randperm(count, generator=step_generator(seed, turn, "pass over the pairs")).tolist()


class PairFolder:
    """The pairs of a folder, one for each captioned image."""

    def __init__(self, path: str | os.PathLike[str], size: int, max_subjects: int = MAX_SUBJECTS) -> None:
        """List the folder and read its captions. size: the side of all images, in pixels.

        ValueError, which names the expected files, when it holds no pair.
        """
        self.path, self.size, self.max_subjects = Path(os.path.realpath(path)), size, max_subjects
        self.skipped: list[str] = []
        """Skipped files with the reason; grows while images are read."""
        self._unreadable: set[tuple[Path, bool]] = set()
        if not self.path.is_dir():
            raise ValueError(f"There is no folder {self.path.name}: make one of {EXPECTED}.")
        entries = [entry for folder in self._subjects() for entry in self._entries(folder)]
        self._check(entries)
        self._masked: dict[str, list[ImageEntry]] = {}
        for entry in entries:
            if entry.has_mask:
                self._masked.setdefault(entry.subject, []).append(entry)
        self.targets = [entry for entry in entries if entry.caption and entry.subject in self._masked]
        self.cut_outs = [entry for group in self._masked.values() for entry in group]
        unmasked = {entry.subject for entry in entries} - self._masked.keys()
        self.skipped += [f"{name}: no image of it has a mask" for name in sorted(unmasked)]
        if not self.targets:
            raise ValueError(
                f"{self.path.name}: no subject has both a caption and a mask: each needs at least one image with "
                "<name>.txt, and one with <name>.mask.png."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """Read the pair of a captioned image. ValueError when no image of the folder can be read."""
        entry, target, subjects = self.draw(index, generator, self.read)
        return Pair(target, entry.caption, torch.stack(subjects), [entry.class_noun] * len(subjects))

    def draw(
        self, index: int, generator: torch.Generator, read: Callable[[ImageEntry, bool], T | None]
    ) -> tuple[ImageEntry, T, list[T]]:
        """A captioned image as read(entry, False), and each of its subject images as read(entry, True).

        read() returns None for unusable images, which are replaced by the next ones.
        """
        for number in range(index, index + len(self)):
            entry = self.targets[number % len(self)]
            target = read(entry, False)
            if target is None:
                continue
            masked = self._masked[entry.subject]
            others = [each for each in masked if each is not entry]
            order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
            count = 1 + int(torch.randint(max(1, min(self.max_subjects, len(others))), (1,), generator=generator))
            cut_outs: list[T] = []
            # Its own cut-out comes last, because the adapter should not learn to copy.
            for each in [*order, *(same for same in masked if same is entry)]:
                redundant = each is entry and bool(cut_outs)
                cut = None if redundant or len(cut_outs) == count else read(each, True)
                cut_outs += [] if cut is None else [cut]
            if cut_outs:
                return entry, target, cut_outs
        raise ValueError(f"{self.path.name}: no pair of images can be read. {'; '.join(self.skipped[-3:])}.")

    def read(self, entry: ImageEntry, cut: bool) -> Tensor | None:
        """[3, S, S] in 0..1: a square crop around the subject or, cut, it alone on white; None if it cannot be read."""
        if (entry.path, cut) in self._unreadable:
            return None
        try:
            image, mask = self._read(entry)
            if not cut:
                square = _square(image, mask)[None]
                return functional.interpolate(square, (self.size,) * 2, mode="bicubic", antialias=True)[0].clamp(0, 1)
            if mask is None:
                raise ValueError("it has neither a mask nor a transparent part")
            if not bool((mask >= SUBJECT).any()):
                raise ValueError("its mask is empty")
            return subject_crop(image.movedim(0, -1)[None], mask[None], self.size)[0].movedim(-1, 0).clamp(0, 1)
        except Exception as error:  # Pillow raises many types for damaged files
            if (entry.path, not cut) not in self._unreadable:
                self.skipped.append(f"{entry.name}: {error or type(error).__name__}"[:200])
            self._unreadable.add((entry.path, cut))
            return None

    def state(self) -> str:
        """A hash of the contents of all files in use."""
        sha = hashlib.sha256()
        for entry in {each.path: each for each in [*self.targets, *self.cut_outs]}.values():
            sha.update(repr((entry.name, entry.class_noun, entry.caption)).encode())
            for path in (entry.path, entry.mask):
                sha.update(b"-" if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).digest())
        return sha.hexdigest()

    def describe(self) -> str:
        """For the user: how much of the folder is used."""
        lines = [
            f"{self.path.name}: {len(self._masked)} subjects, {len(self.targets)} captioned images, "
            f"{len(self.cut_outs)} with a mask"
        ]
        if self.skipped:
            more = f"; and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
            lines.append(f"left out {len(self.skipped)}: {'; '.join(self.skipped[:10])}{more}")
        return "\n".join(lines)

    def _subjects(self) -> Iterator[Path]:
        loose = False
        for path in sorted(self.path.iterdir()):
            if path.name.startswith("."):
                continue
            if not self._inside(path):
                self.skipped.append(f"{path.name}: it leads out of the folder")
            elif path.is_dir():
                yield path
            elif path.suffix.lower() in EXTENSIONS:
                loose = True
        if loose:
            self.skipped.append("images that lie in no subject's folder")

    def _entries(self, folder: Path) -> Iterator[ImageEntry]:
        names = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file() and self._usable(path)}
        noun = self._text(names.get(CLASS)) or re.sub(r"[\s_\-]*\d*$", "", folder.name).replace("_", " ").strip()
        if not noun:
            self.skipped.append(f"{folder.name}: its name has no class noun and there is no {CLASS}")
            return
        for name, path in names.items():
            stem, extension = os.path.splitext(name)
            if extension not in EXTENSIONS or name.endswith(MASK):
                continue
            caption, mask = self._text(names.get(stem + CAPTION)), names.get(stem + MASK)
            has_mask = mask is not None or _has_alpha(path)
            entry = ImageEntry(path, folder.name, noun, caption, mask, has_mask)
            if not caption:
                self.skipped.append(f"{entry.name}: no caption ({path.stem}{CAPTION})")
            if not has_mask:
                self.skipped.append(f"{entry.name}: no mask ({path.stem}{MASK})")
            yield entry

    def _text(self, file: Path | None) -> str:
        if file is None:
            return ""
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_TEXT + 1)
            if len(data) > MAX_TEXT:
                raise ValueError(f"it is longer than {MAX_TEXT} bytes")
            return " ".join(data.decode("utf-8-sig").split())
        except (OSError, ValueError) as error:
            self.skipped.append(f"{file.parent.name}/{file.name}: {error}")
            return ""

    def _check(self, entries: list[ImageEntry]) -> None:
        name = self.path.name
        if not entries:
            why = f" ({self.skipped[0]})" if self.skipped else ""
            raise ValueError(f"{name} holds no images of subjects{why}: make it of {EXPECTED}.")
        first = entries[0]
        for missing, suffix, kind in (
            (not any(entry.caption for entry in entries), CAPTION, "captions"),
            (not any(entry.has_mask for entry in entries), MASK, "masks"),
        ):
            if missing:
                raise ValueError(
                    f"{name} has no {kind}: {first.subject}/{first.path.stem}{suffix} was expected beside "
                    f"{first.path.name}, and so for the others. The folder should be {EXPECTED}."
                )

    def _usable(self, path: Path) -> bool:
        if path.name.startswith(".") or path.suffix.lower() not in (*EXTENSIONS, CAPTION):
            return False
        if self._inside(path):
            return True
        self.skipped.append(f"{path.parent.name}/{path.name}: it leads out of the folder")
        return False

    def _inside(self, path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.path)

    def _read(self, entry: ImageEntry) -> tuple[Tensor, Tensor | None]:
        """The image [3, H, W] on white, and its mask [H, W] or None, both in 0..1."""
        image = _pixels(entry.path, "RGBA")
        alpha = image[3]
        rgb = image[:3] * alpha + (1 - alpha)
        if entry.mask is None:
            return rgb, alpha if bool((alpha < 1).any()) else None
        mask = _pixels(entry.mask, "L")
        height, width = rgb.shape[1:]
        if abs(mask.shape[2] * height / (mask.shape[1] * width) - 1) > SAME_SHAPE:
            raise ValueError(f"its mask is {mask.shape[2]} x {mask.shape[1]}, the image {width} x {height}")
        return rgb, functional.interpolate(mask[None], (height, width), mode="bilinear")[0, 0]


def _has_alpha(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    except Exception:  # reading the file reports it
        return False


def _pixels(path: Path, mode: str) -> Tensor:
    """[channels, H, W] in 0..1, upright."""
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        values = numpy.array(ImageOps.exif_transpose(image).convert(mode), dtype=numpy.float32) / 255
    return torch.from_numpy(values).reshape(values.shape[0], values.shape[1], -1).movedim(-1, 0)


def _square(image: Tensor, mask: Tensor | None) -> Tensor:
    """The largest square of [3, H, W], as close to the subject's centre as the image allows."""
    height, width = image.shape[1:]
    side = min(height, width)
    middle = [height / 2, width / 2]
    if mask is not None and bool((mask >= SUBJECT).any()):
        places = torch.nonzero(mask >= SUBJECT).float()
        middle = ((places.amin(0) + places.amax(0) + 1) / 2).tolist()
    top, left = (
        min(max(round(centre - side / 2), 0), length - side)
        for centre, length in zip(middle, (height, width), strict=True)
    )
    return image[:, top : top + side, left : left + side]
