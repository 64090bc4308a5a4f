"""Folders of images of subjects, for training EZIGen's adapter (Duan et al. 2024, arXiv 2409.08091).

    <folder>/<subject>/<name>.png    an image; .jpg and .webp do too
                       <name>.txt    its caption: images that have one are learned to be drawn
                       <name>.mask.png  white where the subject is: images that have one are shown as the subject
                       class.txt     the class noun, "dog"; without it the folder's name without digits at its end

A sample is one captioned image and the subject cut out of one to four others of the same subject, each alone on
white in a square; of a subject with a single image its own cut-out, as the published training takes it from COCO.
An image's transparency counts as its mask where there is no file of one.

Deviations from the published data, each with its reason: the target is cut to a square around its subject instead of
squeezed into one, which would teach the adapter to distort; several images of a subject are shown in any number from
one to four, theirs fills up with gray ones.

Folders come from anywhere: links out of them are not followed, and what cannot be read is left out and counted.
"""

from __future__ import annotations

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
SAME_SHAPE = 0.02  # relative: how far a mask's proportions may be from its image's
EXPECTED = "<folder>/<subject>/<name>.png with <name>.txt (its caption) and <name>.mask.png (white on the subject)"
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One image's files. shown: it has a mask, or transparency that stands for one (mask is None then)."""

    path: Path
    subject: str
    class_noun: str
    caption: str
    mask: Path | None
    shown: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.subject}/{self.path.name}"


@dataclass(frozen=True)
class Pair:
    """A sample: target [3, S, S] in 0..1; subjects [R, 3, S, S] in 0..1 on white, each with its class noun."""

    target: Tensor
    caption: str
    subjects: Tensor
    classes: list[str]


def subject_prompt(class_noun: str) -> str:
    """What a subject's image is encoded with, as published."""
    return f"a photo of a {class_noun}."


def index_of(seed: int, number: int, count: int) -> int:
    """Which of `count` images the sample with this number in the whole run takes: every pass in an order of its own.

    It depends on nothing else, so that neither the number of processes nor a resume changes it.
    """
    return _order(seed, number // count, count)[number % count]


def pair_generator(seed: int, number: int) -> torch.Generator:
    """Decides which images of the subject are shown in the sample with this number."""
    return step_generator(seed, number, "pair")


@functools.lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return torch.randperm(count, generator=step_generator(seed, turn, "pass over the pairs")).tolist()


class PairFolder:
    """The pairs of a folder, one for each captioned image."""

    def __init__(self, path: str | os.PathLike[str], size: int, max_subjects: int = MAX_SUBJECTS) -> None:
        """Lists the folder and reads its captions. size: the side of all images, in pixels.

        ValueError, with the file that was expected, when there is no pair in it.
        """
        self.path, self.size, self.max_subjects = Path(os.path.realpath(path)), size, max_subjects
        self.skipped: list[str] = []
        """What was left out, and why; grows while images are read."""
        self._dead: set[tuple[Path, bool]] = set()
        if not self.path.is_dir():
            raise ValueError(f"There is no folder {self.path.name}: make one of {EXPECTED}.")
        pictures = [picture for folder in self._subjects() for picture in self._pictures(folder)]
        self._check(pictures)
        self._shown: dict[str, list[Picture]] = {}
        for picture in pictures:
            if picture.shown:
                self._shown.setdefault(picture.subject, []).append(picture)
        self.targets = [picture for picture in pictures if picture.caption and picture.subject in self._shown]
        self.cut_outs = [picture for found in self._shown.values() for picture in found]
        lonely = {picture.subject for picture in pictures} - self._shown.keys()
        self.skipped += [f"{name}: no image of it has a mask" for name in sorted(lonely)]
        if not self.targets:
            raise ValueError(
                f"{self.path.name}: no subject has both a caption and a mask: each needs at least one image with "
                "<name>.txt, and one with <name>.mask.png."
            )

    def __len__(self) -> int:
        return len(self.targets)

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """The pair of a captioned image, read anew. ValueError when no image of the folder can be read."""
        picture, target, subjects = self.drawn(index, generator, self.target, self.cut_out)
        return Pair(target, picture.caption, torch.stack(subjects), [picture.class_noun] * len(subjects))

    def drawn(
        self,
        index: int,
        generator: torch.Generator,
        target: Callable[[Picture], T | None],
        cut_out: Callable[[Picture], T | None],
    ) -> tuple[Picture, T, list[T]]:
        """A captioned image, what target() makes of it, and what cut_out() makes of the images shown beside it.

        Either gives None for an image that cannot be used; the next one then takes its place.
        """
        for number in range(index, index + len(self)):
            picture = self.targets[number % len(self)]
            found = target(picture)
            if found is None:
                continue
            shown = self._shown[picture.subject]
            others = [each for each in shown if each is not picture]
            order = [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]
            wanted = 1 + int(torch.randint(max(1, min(self.max_subjects, len(others))), (1,), generator=generator))
            taken: list[T] = []
            # Its own cut-out comes last: copying is what the adapter should not learn.
            for each in [*order, *(own for own in shown if own is picture)]:
                alone = each is picture and bool(taken)
                cut = None if alone or len(taken) == wanted else cut_out(each)
                taken += [] if cut is None else [cut]
            if taken:
                return picture, found, taken
        raise ValueError(f"{self.path.name}: no pair of images can be read. {'; '.join(self.skipped[-3:])}.")

    def target(self, picture: Picture) -> Tensor | None:
        """[3, S, S] in 0..1, a square around the subject; None when it cannot be read."""

        def read() -> Tensor:
            image, mask = self._read(picture)
            square = _square(image, mask)
            small = functional.interpolate(square[None], (self.size,) * 2, mode="bicubic", antialias=True)
            return small[0].clamp(0, 1)

        return self._alive(picture, False, read)

    def cut_out(self, picture: Picture) -> Tensor | None:
        """[3, S, S] in 0..1, the subject alone on white; None when it cannot be read."""

        def read() -> Tensor:
            image, mask = self._read(picture)
            if mask is None:
                raise ValueError("it has neither a mask nor a transparent part")
            if not bool((mask >= SUBJECT).any()):
                raise ValueError("its mask is empty")
            return subject_crop(image.movedim(0, -1)[None], mask[None], self.size)[0].movedim(-1, 0).clamp(0, 1)

        return self._alive(picture, True, read)

    def state(self) -> str:
        """Changes when a file that counts does: its contents are what is looked at."""
        sha = hashlib.sha256()
        for picture in {each.path: each for each in [*self.targets, *self.cut_outs]}.values():
            sha.update(repr((picture.name, picture.class_noun, picture.caption)).encode())
            for path in (picture.path, picture.mask):
                sha.update(b"-" if path is None or not path.is_file() else hashlib.sha256(path.read_bytes()).digest())
        return sha.hexdigest()

    def describe(self) -> str:
        """For people: how much of it is used."""
        lines = [
            f"{self.path.name}: {len(self._shown)} subjects, {len(self.targets)} captioned images, "
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

    def _pictures(self, folder: Path) -> Iterator[Picture]:
        names = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file() and self._usable(path)}
        noun = self._class_noun(folder, names.get(CLASS))
        if not noun:
            self.skipped.append(f"{folder.name}: its name has no class noun and there is no {CLASS}")
            return
        for name, path in names.items():
            stem, extension = os.path.splitext(name)
            if extension not in EXTENSIONS or name.endswith(MASK):
                continue
            caption, mask = self._text(names.get(stem + CAPTION)), names.get(stem + MASK)
            shown = mask is not None or _has_alpha(path)
            picture = Picture(path, folder.name, noun, caption, mask, shown)
            if not caption:
                self.skipped.append(f"{picture.name}: no caption ({path.stem}{CAPTION})")
            if not shown:
                self.skipped.append(f"{picture.name}: no mask ({path.stem}{MASK})")
            yield picture

    def _class_noun(self, folder: Path, file: Path | None) -> str:
        written = self._text(file)
        return written or re.sub(r"[\s_\-]*\d*$", "", folder.name).replace("_", " ").strip()

    def _text(self, file: Path | None) -> str:
        if file is None:
            return ""
        try:
            with file.open("rb") as opened:
                found = opened.read(MAX_TEXT + 1)
            if len(found) > MAX_TEXT:
                raise ValueError(f"it is longer than {MAX_TEXT} bytes")
            return " ".join(found.decode("utf-8-sig").split())
        except (OSError, ValueError) as error:
            self.skipped.append(f"{file.parent.name}/{file.name}: {error}")
            return ""

    def _check(self, pictures: list[Picture]) -> None:
        name = self.path.name
        if not pictures:
            raise ValueError(f"{name} holds no images of subjects{self._first()}: make it of {EXPECTED}.")
        first = pictures[0]
        for missing, wanted, what in (
            (not any(picture.caption for picture in pictures), CAPTION, "captions"),
            (not any(picture.shown for picture in pictures), MASK, "masks"),
        ):
            if missing:
                raise ValueError(
                    f"{name} has no {what}: {first.subject}/{first.path.stem}{wanted} was expected beside "
                    f"{first.path.name}, and so for the others. The folder should be {EXPECTED}."
                )

    def _first(self) -> str:
        return f" ({self.skipped[0]})" if self.skipped else ""

    def _usable(self, path: Path) -> bool:
        if path.name.startswith(".") or path.suffix.lower() not in (*EXTENSIONS, CAPTION):
            return False
        if self._inside(path):
            return True
        self.skipped.append(f"{path.parent.name}/{path.name}: it leads out of the folder")
        return False

    def _inside(self, path: Path) -> bool:
        real = os.path.realpath(path)
        same_drive = os.path.splitdrive(real)[0] == os.path.splitdrive(self.path)[0]
        return same_drive and os.path.commonpath([real, str(self.path)]) == str(self.path)

    def _alive(self, picture: Picture, cut: bool, read: Callable[[], Tensor]) -> Tensor | None:
        if (picture.path, cut) in self._dead:
            return None
        try:
            return read()
        except Exception as error:  # Pillow raises many types for damaged files
            if (picture.path, not cut) not in self._dead:
                self.skipped.append(f"{picture.name}: {error or type(error).__name__}"[:200])
            self._dead.add((picture.path, cut))
            return None

    def _read(self, picture: Picture) -> tuple[Tensor, Tensor | None]:
        """The image [3, H, W] on white, and its mask [H, W] or None, both in 0..1."""
        image = _pixels(picture.path, "RGBA")
        alpha = image[3]
        rgb = image[:3] * alpha + (1 - alpha)
        if picture.mask is None:
            return rgb, alpha if bool((alpha < 1).any()) else None
        mask = _pixels(picture.mask, "L")
        height, width = rgb.shape[1:]
        if abs(mask.shape[2] * height / (mask.shape[1] * width) - 1) > SAME_SHAPE:
            raise ValueError(f"its mask is {mask.shape[2]} x {mask.shape[1]}, the image {width} x {height}")
        return rgb, functional.interpolate(mask[None], (height, width), mode="bilinear")[0, 0]


def _has_alpha(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    except Exception:  # it is found again, and counted, when it is read
        return False


def _pixels(path: Path, mode: str) -> Tensor:
    """[channels, H, W] in 0..1, upright."""
    import numpy
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        values = numpy.array(ImageOps.exif_transpose(image).convert(mode), dtype=numpy.float32) / 255
    return torch.from_numpy(values).reshape(values.shape[0], values.shape[1], -1).movedim(-1, 0)


def _square(image: Tensor, mask: Tensor | None) -> Tensor:
    """The largest square of [3, H, W], as near to the middle of the subject as the image allows."""
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
