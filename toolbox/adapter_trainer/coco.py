"""COCO for EZIGen's training (Duan et al. 2024, arXiv 2409.08091): an image, and its own objects cut out.

    <folder>/annotations/instances_train2014.json, captions_train2014.json
    <folder>/train2014/COCO_train2014_000000000009.jpg       likewise for other parts, such as val2014

Source: the dataset of the reference code, with its rules. The target is the whole image, stretched to a square; its
caption is the longest one; its subjects are up to four instances of at least 1000 pixels, the largest first, and only
from the larger half if there are more than four. Each is cut out by its polygons onto white, stretched like the image,
cropped and padded to a square. Deviations, each with its reason:
- an image without a usable instance or caption is skipped; the reference code uses four black images;
- a cut-out is resized once instead of three times, with averaging when it shrinks; its box is that of its mask;
- class names are COCO's own; the reference code's are concatenated ("sportsball") and one is damaged.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.ezigen.subject_pairs import MAX_SUBJECTS, Pair
from .masks import cut_out, place, read_image, run_lengths, unpack

MIN_AREA = 1000
PREFIX = "instances_"
EXPECTED = "annotations/instances_<part>.json, annotations/captions_<part>.json and the images in <part>/"
TRIES = 200  # consecutive unusable images, which mean that the disk is gone and not a single file


@dataclass(frozen=True)
class Record:
    """An image with its caption, and the class and mask of each usable instance, the largest first."""

    path: Path
    caption: str
    instances: list[tuple[str, dict[str, Any]]]


class Coco:
    """The pairs of a COCO folder, one per usable image, in the order of the annotation files."""

    def __init__(self, path: Path, size: int, max_subjects: int = MAX_SUBJECTS, limit: int = 0) -> None:
        """limit: use only the first images of each part; 0 for all.

        ValueError, which says what is expected, when there is nothing to learn from.
        """
        self.path, self.size, self.max_subjects = path, size, max_subjects
        self.skipped: list[str] = []
        """Skipped files with the reason; grows while images are read."""
        self.records: list[Record] = []
        self.left_out = self.damaged = 0
        for file in sorted((path / "annotations").glob(f"{PREFIX}*.json")):
            self._add_part(file, limit)
        if not self.records:
            raise ValueError(f"{path.name} has no captioned image with a usable instance: it should hold {EXPECTED}.")

    def __len__(self) -> int:
        return len(self.records)

    def describe(self) -> str:
        return (
            f"COCO in {self.path.name}: {len(self)} images, {self.left_out} left out (no caption, no usable "
            f"instance), {self.damaged} damaged masks"
        )

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """The pair of an image, or of the next usable one."""
        for number in range(index, index + min(TRIES, len(self))):
            record = self.records[number % len(self)]
            try:
                return self._read(record)
            except Exception as error:  # Pillow raises many types for damaged files
                self.skipped.append(f"{record.path.name}: {error or type(error).__name__}"[:200])
        raise ValueError(f"{self.path.name}: no image can be read. {'; '.join(self.skipped[-3:])}.")

    def _read(self, record: Record) -> Pair:
        image, instances = read_image(record.path), record.instances[: self.max_subjects]
        subjects = []
        for _, runs in instances:
            cut = cut_out(image, unpack(runs, image))
            width, height = cut.width / image.width, cut.height / image.height  # of the image stretched to a square
            scale = self.size / max(width, height)
            subjects.append(place(cut, width * scale, height * scale, self.size))
        target = place(image, self.size, self.size, self.size)
        return Pair(target, record.caption, torch.stack(subjects), [noun for noun, _ in instances])

    def _add_part(self, file: Path, limit: int) -> None:
        from pycocotools.coco import COCO

        part = file.stem.removeprefix(PREFIX)
        captions, folder = file.with_name(f"captions_{part}.json"), self.path / part
        for expected, what in ((captions, "captions"), (folder, "images")):
            if not expected.exists():
                raise ValueError(
                    f"{self.path.name} has no {what} of {part}: {expected.relative_to(self.path)} was expected. "
                    f"It should hold {EXPECTED}."
                )
        with annotation_file(captions):
            texts = COCO(str(captions))
        with annotation_file(file):
            objects = COCO(str(file))
            for image in objects.dataset["images"][: limit or None]:
                own = [" ".join(each["caption"].split()) for each in texts.imgToAnns[image["id"]]]
                caption, instances = max(own, key=len, default=""), self._instances(objects, image)
                if caption and instances:
                    self.records.append(Record(folder / Path(image["file_name"]).name, caption, instances))
                else:
                    self.left_out += 1

    def _instances(self, coco: Any, image: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """An image's usable instances, the largest first; without crowds, on whose run lengths the reference fails. A
        damaged one among half a million is counted and left out.
        """
        instances = []
        order = sorted(coco.imgToAnns[image["id"]], key=lambda each: each["area"], reverse=True)
        for each in order[: len(order) // 2] if len(order) > MAX_SUBJECTS else order:
            if each["area"] < MIN_AREA or not isinstance(each["segmentation"], list):
                continue
            runs = run_lengths(each["segmentation"], image["height"], image["width"])
            if runs is None:
                self.damaged += 1
            else:
                instances.append((coco.cats[each["category_id"]]["name"], runs))
        return instances


@contextlib.contextmanager
def annotation_file(file: Path) -> Iterator[None]:
    """Reading an annotation file: ValueError, with the remedy, when it is none."""
    try:
        yield
    except (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file.name} is not a file of annotations ({error!r}): download it again.") from error
