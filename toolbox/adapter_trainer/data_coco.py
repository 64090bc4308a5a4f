"""COCO as EZIGen (Duan et al. 2024, arXiv 2409.08091) is trained on it: an image, and its own objects cut out.

    <folder>/annotations/instances_train2014.json, captions_train2014.json
    <folder>/train2014/COCO_train2014_000000000009.jpg       and so for each other part, such as val2014

Source: the authors' data set, with its rules: the target is the whole image stretched to a square; its caption is
the longest; its subjects are up to four instances, the largest first, of an area of 1000 pixels or more, and of a
image with more than four only of the larger half. Each is cut out by its polygons, on white, stretched as the
image, cropped and padded to a square. Deviations, each with its reason:
- an image without a usable instance, or without a caption, is left out; theirs shows four black images;
- a cut-out is resized once and not three times, with averaging where it shrinks; its box is that of its mask;
- class names are COCO's own; theirs are glued together ("sportsball") and one is damaged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.ezigen.subject_pairs import MAX_SUBJECTS, Pair
from .masks import Pixels, bounds, on_white, packed_if_whole, pixels, placed, unpacked

MIN_AREA = 1000
PREFIX = "instances_"
EXPECTED = "annotations/instances_<part>.json, annotations/captions_<part>.json and the images in <part>/"
TRIES = 200  # images in a row that cannot be used: then the disk is gone, not a file


@dataclass(frozen=True)
class Instance:
    """An object in an image: its class, and its mask as packed() keeps it."""

    noun: str
    segmentation: Any


@dataclass(frozen=True)
class Record:
    """An image with a caption and the instances that may be shown, the largest first."""

    path: Path
    caption: str
    instances: list[Instance]


class Coco:
    """The pairs of a COCO folder, one for each usable image, in the order of the files of annotations."""

    def __init__(self, path: Path, size: int, max_subjects: int = MAX_SUBJECTS, limit: int = 0) -> None:
        """limit: how many images of each part are taken, from the first on; 0 for all.

        ValueError, with what was expected, when there is nothing to learn from.
        """
        self.path, self.size, self.max_subjects = path, size, max_subjects
        self.skipped: list[str] = []
        """What could not be used, and why; grows while images are read."""
        self.records: list[Record] = []
        self.left_out = self.damaged = 0
        for file in sorted((path / "annotations").glob(f"{PREFIX}*.json")):
            self._add_part(file, limit)
        if not self.records:
            raise ValueError(f"{path.name} has no captioned image with a usable instance: it should hold {EXPECTED}.")

    def __len__(self) -> int:
        return len(self.records)

    def describe(self) -> str:
        """For people."""
        return (
            f"COCO in {self.path.name}: {len(self)} images, {self.left_out} left out (no caption, no usable "
            f"instance), {self.damaged} damaged masks"
        )

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """The pair of an image, or of the next one that can be used."""
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
                    placed(image, (self.size, self.size), self.size), record.caption, torch.stack(subjects), nouns
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
                mask = unpacked(instance.segmentation, height, width)
            except Exception as error:
                self.skipped.append(f"a {instance.noun} in {record.path.name}: {error}"[:200])
                continue
            left, top, right, bottom = bounds(mask)
            inner = ((right - left) / width, (bottom - top) / height)  # of the image stretched to a square
            scale = self.size / max(inner)
            cut = on_white(image, mask)[top:bottom, left:right]
            subjects.append(placed(cut, (inner[0] * scale, inner[1] * scale), self.size))
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
        found: dict[int, list[dict[str, Any]]] = {}
        for each in annotations:
            found.setdefault(each["image_id"], []).append(each)
        for each in images[: limit or len(images)]:
            shown = [
                (nouns[one["category_id"]], packed_if_whole(one["segmentation"]))
                for one in usable(found.get(each["id"], []))
            ]
            chosen = [Instance(noun, mask) for noun, mask in shown if mask is not None]
            self.damaged += len(shown) - len(chosen)
            caption = captions.get(each["id"])
            if chosen and caption:
                self.records.append(Record(folder / Path(each["file_name"]).name, caption, chosen))
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


def usable(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The instances of an image that may be shown, the largest first. A crowd's run lengths are not; theirs fail."""
    order = sorted(annotations, key=lambda each: each["area"], reverse=True)
    half = order[: len(order) // 2] if len(order) > MAX_SUBJECTS else order
    return [each for each in half if each["area"] >= MIN_AREA and isinstance(each["segmentation"], list)]


def tables(file: Path, *names: str) -> list[list[dict[str, Any]]]:
    """Tables of a file of annotations. ValueError when it is not one."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON file ({error}): download it again.") from error
    for name in names:
        if not isinstance(found, dict) or not isinstance(found.get(name), list):
            raise ValueError(f"{file.name} has no table '{name}': it is not a file of annotations.")
    return [found[name] for name in names]
