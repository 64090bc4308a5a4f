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

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.ezigen.subject_pairs import MAX_SUBJECTS, Pair
from .masks import Pixels, bounds, on_white, pack_if_valid, pixels, place, unpack

MIN_AREA = 1000
PREFIX = "instances_"
EXPECTED = "annotations/instances_<part>.json, annotations/captions_<part>.json and the images in <part>/"
TRIES = 200  # consecutive unusable images, which mean that the disk is gone and not a single file


@dataclass(frozen=True)
class Instance:
    """An object in an image: its class, and its mask in the form of pack()."""

    noun: str
    segmentation: Any


@dataclass(frozen=True)
class Record:
    """An image with its caption and its usable instances, the largest first."""

    path: Path
    caption: str
    instances: list[Instance]


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
        """A line for the user."""
        return (
            f"COCO in {self.path.name}: {len(self)} images, {self.left_out} left out (no caption, no usable "
            f"instance), {self.damaged} damaged masks"
        )

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """The pair of an image, or of the next usable one."""
        for number in range(index, index + min(TRIES, len(self))):
            record = self.records[number % len(self)]
            try:
                image = pixels(record.path)
                subjects, nouns = self._subjects(record, image)
            except Exception as error:  # Pillow raises many types for damaged files
                self.skipped.append(f"{record.path.name}: {error or type(error).__name__}"[:200])
                continue
            if subjects:
                return Pair(
                    place(image, (self.size, self.size), self.size), record.caption, torch.stack(subjects), nouns
                )
        raise ValueError(f"{self.path.name}: no image can be read. {'; '.join(self.skipped[-3:])}.")

    def _subjects(self, record: Record, image: Pixels) -> tuple[list[Tensor], list[str]]:
        """The first instances that can be cut out; the others are skipped and counted."""
        subjects, nouns = [], []
        height, width = image.shape[:2]
        for instance in record.instances:
            if len(subjects) == self.max_subjects:
                break
            try:
                mask = unpack(instance.segmentation, height, width)
            except Exception as error:
                self.skipped.append(f"a {instance.noun} in {record.path.name}: {error}"[:200])
                continue
            left, top, right, bottom = bounds(mask)
            inner = ((right - left) / width, (bottom - top) / height)  # of the image stretched to a square
            scale = self.size / max(inner)
            cut = on_white(image, mask)[top:bottom, left:right]
            subjects.append(place(cut, (inner[0] * scale, inner[1] * scale), self.size))
            nouns.append(instance.noun)
        return subjects, nouns

    def _add_part(self, file: Path, limit: int) -> None:
        part = file.stem.removeprefix(PREFIX)
        captions, folder = file.with_name(f"captions_{part}.json"), self.path / part
        for expected, what in ((captions, "captions"), (folder, "images")):
            if not expected.exists():
                raise ValueError(
                    f"{self.path.name} has no {what} of {part}: {expected.relative_to(self.path)} was expected. "
                    f"It should hold {EXPECTED}."
                )
        try:
            self._add_records(file, folder, _longest(captions), limit)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file.name} is not a file of COCO annotations ({error!r}): download it again."
            ) from error

    def _add_records(self, file: Path, folder: Path, captions: dict[int, str], limit: int) -> None:
        categories, annotations, images = tables(file, "categories", "annotations", "images")
        nouns = {each["id"]: each["name"] for each in categories}
        by_image: dict[int, list[dict[str, Any]]] = {}
        for each in annotations:
            by_image.setdefault(each["image_id"], []).append(each)
        for each in images[: limit or len(images)]:
            candidates = [
                (nouns[one["category_id"]], pack_if_valid(one["segmentation"]))
                for one in usable_instances(by_image.get(each["id"], []))
            ]
            instances = [Instance(noun, mask) for noun, mask in candidates if mask is not None]
            self.damaged += len(candidates) - len(instances)
            caption = captions.get(each["id"])
            if instances and caption:
                self.records.append(Record(folder / Path(each["file_name"]).name, caption, instances))
            else:
                self.left_out += 1


def _longest(file: Path) -> dict[int, str]:
    """The longest caption of every image."""
    (annotations,) = tables(file, "annotations")
    longest: dict[int, str] = {}
    for each in annotations:
        text = " ".join(each["caption"].split())
        if len(text) > len(longest.get(each["image_id"], "")):
            longest[each["image_id"]] = text
    return longest


def usable_instances(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The usable instances of an image, the largest first; without crowds, on whose run lengths the reference fails."""
    order = sorted(annotations, key=lambda each: each["area"], reverse=True)
    half = order[: len(order) // 2] if len(order) > MAX_SUBJECTS else order
    return [each for each in half if each["area"] >= MIN_AREA and isinstance(each["segmentation"], list)]


def tables(file: Path, *names: str) -> list[list[dict[str, Any]]]:
    """The tables of an annotation file. ValueError when it is not one."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON file ({error}): download it again.") from error
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{file.name} has no table '{name}': it is not a file of annotations.")
    return [content[name] for name in names]
