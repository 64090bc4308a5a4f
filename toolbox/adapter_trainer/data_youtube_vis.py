"""YouTube-VIS for EZIGen's training (Duan et al. 2024, arXiv 2409.08091): an object in two frames of a video.

    <folder>/train.json or instances.json     videos, categories, and a mask of every object in every frame
    <folder>/JPEGImages/<video>/<frame>.jpg    or train/JPEGImages, or train_all_frames/JPEGImages

Source: the dataset of the reference code (AnyDoor's), with its rules. Every sample draws a video, an object in it, and
two frames at least an eighth of the object's frames apart. The earlier frame gives the subject: cut out on white, with
a margin of 1.1 to 1.4, in a square, and mirrored half of the time. The later frame gives the target: a square around
the object's box, 1.1 x 1.3 to 1.1 x 2.9 as wide, black outside the frame. The caption is one of 30 plain sentences with
the class. A draw is repeated unless all of these hold: the largest connected part of the subject's mask is more than
0.9 of it; both masks cover 0.01 to 0.64 of their frames; the subject's box spans at least 0.1 of the frame in one
direction, and the target's widened box at most 0.8 in one. Deviations, each with its reason:
- the masks come from the dataset's annotation file; the reference code's come from images of another edition of it;
- the two frames are never the same one, as the target would then contain exactly the subject's pixels;
- parts of a mask are measured in pixels, in the reference code by the area within their outlines;
- the sentences are our own, with an article before the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...core.ezigen.subject_pairs import Pair
from .data_coco import tables
from .masks import Box, Mask, Pixels, bounds, largest_part, on_white, pack_if_valid, pixels, place, unpack

DRAWS = 100_000  # published
ANNOTATIONS = ("train.json", "instances.json", "train/instances.json", "train/train.json", "annotations/instances.json")
FRAMES = ("JPEGImages", "train/JPEGImages", "train_all_frames/JPEGImages")
EXPECTED = f"{ANNOTATIONS[0]} or {ANNOTATIONS[1]}, and the frames in {FRAMES[0]}/ or {FRAMES[1]}/"
ONE_PART, AREA, SMALLEST, LARGEST = 0.9, (0.01, 0.64), 0.1, 0.8
MARGINS, TARGET_MARGIN, WINDOWS = (1.1, 1.2, 1.3, 1.4), 1.1, tuple(number / 10 for number in range(13, 30))
TRIES = 500  # consecutive unusable draws
MAX_DEAD = 50  # consecutive unreadable files, which mean that the disk is gone and not a single file
SENTENCES = (
    *("a picture of a {}.", "a photo of a {}.", "an image of a {}.", "a photograph of a {}.", "a snapshot of a {}."),
    *("a clear picture of a {}.", "a clear photo of a {}.", "a plain picture of a {}.", "a plain photo of a {}."),
    *("a simple picture of a {}.", "a simple photo of a {}.", "an ordinary picture of a {}.", "a {} in a picture."),
    *("an ordinary photo of a {}.", "an everyday picture of a {}.", "an everyday photo of a {}.", "a {} in a photo."),
    *("a view of a {}.", "a plain view of a {}.", "a clear view of a {}.", "a close view of a {}.", "a shot of a {}."),
    *("a typical picture of a {}.", "a typical photo of a {}.", "a frame that shows a {}.", "a {}, as it is."),
    *("a picture that shows a {}.", "a photo that shows a {}.", "a {} before the camera.", "a still of a {}."),
)


@dataclass(frozen=True)
class Object:
    """An object of a video: its class, and its masks by frame number."""

    noun: str
    masks: dict[int, Any]


@dataclass(frozen=True)
class Video:
    """A video and its objects, each visible in two or more frames."""

    files: list[Path]
    objects: list[Object]


class Unusable(Exception):
    """A draw that breaks one of the rules."""


class YoutubeVis:
    """Pairs from videos; a pair depends on the generator alone."""

    def __init__(self, path: Path, size: int, draws: int = DRAWS) -> None:
        """draws: number of samples in one pass over the data.

        ValueError, which says what is expected, when there is nothing to learn from.
        """
        self.path, self.size, self.draws = path, size, draws
        self.skipped: list[str] = []
        """Skipped files with the reason; grows while frames are read."""
        annotations = next((path / name for name in ANNOTATIONS if (path / name).is_file()), None)
        frames = next((path / name for name in FRAMES if (path / name).is_dir()), None)
        if annotations is None or frames is None:
            what = "file of annotations" if annotations is None else "folder of frames"
            raise ValueError(f"{path.name} has no {what}: it should hold {EXPECTED}.")
        try:
            self.videos = _videos(annotations, frames)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{annotations.name} is not a file of YouTube-VIS annotations ({error!r}): download it again."
            ) from error
        if not self.videos:
            raise ValueError(f"{annotations.name} has no object with masks in two frames: download it again.")

    def __len__(self) -> int:
        return self.draws

    def describe(self) -> str:
        """A line for the user."""
        objects = sum(len(video.objects) for video in self.videos)
        return f"YouTube-VIS in {self.path.name}: {objects} objects in {len(self.videos)} videos, {self.draws} draws"

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """A random pair; the index is ignored."""
        dead = 0
        for _ in range(TRIES):
            try:
                return self._draw(_Dice(generator))
            except Unusable:
                continue
            except Exception as error:  # Pillow raises many types for damaged files
                self.skipped.append(f"{error or type(error).__name__}"[:200])
                dead += 1
                if dead == MAX_DEAD:
                    break
        raise ValueError(
            f"{self.path.name}: no pair could be drawn. {'; '.join(self.skipped[-3:]) or 'All break the rules'}."
        )

    def _draw(self, dice: _Dice) -> Pair:
        video = dice.one_of(self.videos)
        thing = dice.one_of(video.objects)
        frames = sorted(thing.masks)
        apart = max(1, len(frames) // 8)
        first = dice.below(len(frames) - apart)
        last = first + apart + dice.below(len(frames) - apart - first)
        subject_frame, target_frame = (self._frame(video, thing, frames[number]) for number in (first, last))
        subject, target = cut_out(*subject_frame, self.size, dice), window(*target_frame, self.size, dice)
        return Pair(target, dice.one_of(SENTENCES).format(thing.noun), subject[None], [thing.noun])

    def _frame(self, video: Video, thing: Object, number: int) -> tuple[Pixels, Mask]:
        file = video.files[number]
        try:
            image = pixels(file)
            return image, unpack(thing.masks[number], *image.shape[:2])
        except Exception as error:
            raise OSError(f"{file.parent.name}/{file.name}: {error or type(error).__name__}") from error


class _Dice:
    """Draws from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def one_of(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]


def cut_out(image: Pixels, mask: Mask, size: int, dice: _Dice) -> Tensor:
    """The subject on white, [3, size, size] in 0..1. Raises Unusable when its mask breaks a rule."""
    height, width = mask.shape
    left, top, right, bottom = bounds(mask)
    _check_area(mask)
    if largest_part(mask) <= ONE_PART or (right - left < SMALLEST * width and bottom - top < SMALLEST * height):
        raise Unusable
    scale = size / (dice.one_of(MARGINS) * max(right - left, bottom - top))
    cut = on_white(image, mask)[top:bottom, left:right]
    square = place(cut, ((right - left) * scale, (bottom - top) * scale), size)
    return square.flip(-1) if dice.below(2) else square


def window(image: Pixels, mask: Mask, size: int, dice: _Dice) -> Tensor:
    """The target: a square around the object, [3, size, size] in 0..1. Raises Unusable when its mask breaks a rule."""
    height, width = mask.shape
    _check_area(mask)
    box = widen(bounds(mask), TARGET_MARGIN, width, height)
    if box[2] - box[0] > LARGEST * width and box[3] - box[1] > LARGEST * height:
        raise Unusable
    left, top, right, bottom = to_square(widen(box, dice.one_of(WINDOWS), width, height), width, height)
    scale = size / max(right - left, bottom - top)
    inner = ((right - left) * scale, (bottom - top) * scale)
    return place(numpy.ascontiguousarray(image[top:bottom, left:right]), inner, size, colour=0)


def widen(box: Box, ratio: float, width: int, height: int) -> Box:
    """Enlarge the box around its centre, within the frame."""
    middles = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    halves = ratio * (box[2] - box[0]) / 2, ratio * (box[3] - box[1]) / 2
    left, top = (max(0, int(middle - half)) for middle, half in zip(middles, halves, strict=True))
    right, bottom = (
        min(length, int(middle + half)) for middle, half, length in zip(middles, halves, (width, height), strict=True)
    )
    return left, top, right, bottom


def to_square(box: Box, width: int, height: int) -> Box:
    """Extend the box to a square of its longer side, within the frame."""
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (max(0, (low + high - side) // 2) for low, high in ((box[0], box[2]), (box[1], box[3])))
    right, bottom = (
        min(length, (low + high + side) // 2)
        for low, high, length in ((box[0], box[2], width), (box[1], box[3], height))
    )
    return left, top, right, bottom


def _check_area(mask: Mask) -> None:
    if not AREA[0] <= mask.mean() <= AREA[1]:
        raise Unusable


def _videos(file: Path, frames: Path) -> list[Video]:
    categories, videos, annotations = tables(file, "categories", "videos", "annotations")
    nouns = {each["id"]: each["name"].replace("_", " ") for each in categories}
    objects: dict[int, list[Object]] = {}
    for each in annotations:
        frame_masks = {number: pack_if_valid(one) for number, one in enumerate(each["segmentations"]) if one}
        masks = {number: mask for number, mask in frame_masks.items() if mask is not None}
        if len(masks) > 1:
            objects.setdefault(each["video_id"], []).append(Object(nouns[each["category_id"]], masks))
    return [
        Video([frames.joinpath(*Path(name).parts[-2:]) for name in each["file_names"]], objects[each["id"]])
        for each in videos
        if each["id"] in objects
    ]
