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

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...core.ezigen.subject_pairs import Pair
from .coco import annotation_file
from .masks import Mask, cut_out, largest_part, place, read_image, run_lengths, unpack

DRAWS = 100_000  # published
ANNOTATIONS = ("train.json", "instances.json", "train/instances.json", "train/train.json", "annotations/instances.json")
FRAMES = ("JPEGImages", "train/JPEGImages", "train_all_frames/JPEGImages")
EXPECTED = f"{ANNOTATIONS[0]} or {ANNOTATIONS[1]}, and the frames in {FRAMES[0]}/ or {FRAMES[1]}/"
ONE_PART, AREA, SMALLEST, LARGEST = 0.9, (0.01, 0.64), 0.1, 0.8
MARGINS, TARGET_MARGIN, WINDOWS = (1.1, 1.2, 1.3, 1.4), 1.1, tuple(number / 10 for number in range(13, 30))
TRIES = 500  # consecutive unusable draws
SENTENCES = (
    *("a picture of a {}.", "a photo of a {}.", "an image of a {}.", "a photograph of a {}.", "a snapshot of a {}."),
    *("a clear picture of a {}.", "a clear photo of a {}.", "a plain picture of a {}.", "a plain photo of a {}."),
    *("a simple picture of a {}.", "a simple photo of a {}.", "an ordinary picture of a {}.", "a {} in a picture."),
    *("an ordinary photo of a {}.", "an everyday picture of a {}.", "an everyday photo of a {}.", "a {} in a photo."),
    *("a view of a {}.", "a plain view of a {}.", "a clear view of a {}.", "a close view of a {}.", "a shot of a {}."),
    *("a typical picture of a {}.", "a typical photo of a {}.", "a frame that shows a {}.", "a {}, as it is."),
    *("a picture that shows a {}.", "a photo that shows a {}.", "a {} before the camera.", "a still of a {}."),
)

Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are exclusive
Object = tuple[str, dict[Path, dict[str, Any]]]
"""An object of a video: its class, and its masks by the file of the frame, two or more."""


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
        with annotation_file(annotations):
            self.videos = _videos(json.loads(annotations.read_bytes()), frames)
        if not self.videos:
            raise ValueError(f"{annotations.name} has no object with masks in two frames: download it again.")

    def __len__(self) -> int:
        return self.draws

    def describe(self) -> str:
        objects = sum(map(len, self.videos))
        return f"YouTube-VIS in {self.path.name}: {objects} objects in {len(self.videos)} videos, {self.draws} draws"

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        """A random pair; the index is ignored."""
        dice = random.Random(generator.initial_seed())
        for _ in range(TRIES):
            with contextlib.suppress(Unusable):
                return self._draw(dice)
        problems = "; ".join(self.skipped[-3:]) or "All break the rules"
        raise ValueError(f"{self.path.name}: no pair could be drawn. {problems}.")

    def _draw(self, dice: random.Random) -> Pair:
        noun, masks = dice.choice(dice.choice(self.videos))
        frames = list(masks)
        apart = max(1, len(frames) // 8)
        first = dice.randrange(len(frames) - apart)
        last = dice.randrange(first + apart, len(frames))
        both = frames[first], frames[last]
        (subject_image, subject_mask), (image, mask) = (self._frame(file, masks[file]) for file in both)
        subject = subject_alone(subject_image, subject_mask, self.size, dice)
        target = window(image, mask, self.size, dice)
        return Pair(target, dice.choice(SENTENCES).format(noun), subject[None], [noun])

    def _frame(self, file: Path, runs: dict[str, Any]) -> tuple[Image.Image, Mask]:
        try:
            image = read_image(file)
            mask = unpack(runs, image)
        except Exception as error:  # Pillow raises many types for damaged files
            self.skipped.append(f"{file.parent.name}/{file.name}: {error or type(error).__name__}"[:200])
            raise Unusable from error
        if not AREA[0] <= mask.mean() <= AREA[1]:
            raise Unusable
        return image, mask


def subject_alone(image: Image.Image, mask: Mask, size: int, dice: random.Random) -> Tensor:
    """The subject on white, [3, size, size] in 0..1. Raises Unusable when its mask breaks a rule."""
    cut = cut_out(image, mask)
    small = cut.width < SMALLEST * image.width and cut.height < SMALLEST * image.height
    if small or largest_part(mask) <= ONE_PART:
        raise Unusable
    scale = size / (dice.choice(MARGINS) * max(cut.size))
    square = place(cut, cut.width * scale, cut.height * scale, size)
    return square.flip(-1) if dice.randrange(2) else square


def window(image: Image.Image, mask: Mask, size: int, dice: random.Random) -> Tensor:
    """The target: a square around the object, [3, size, size] in 0..1. Raises Unusable when its mask breaks a rule."""
    bounds = Image.fromarray(mask).getbbox()
    assert bounds is not None  # unpack() refuses empty masks
    box = widen(bounds, TARGET_MARGIN, image.size)
    if box[2] - box[0] > LARGEST * image.width and box[3] - box[1] > LARGEST * image.height:
        raise Unusable
    box = widen(box, dice.choice(WINDOWS), image.size)
    side = max(box[2] - box[0], box[3] - box[1])
    part = image.crop(around(box, (side, side), image.size))
    scale = size / side
    return place(part, part.width * scale, part.height * scale, size, "black")


def widen(box: Box, ratio: float, frame: tuple[int, int]) -> Box:
    """Enlarge the box around its centre, within the frame."""
    return around(box, (ratio * (box[2] - box[0]), ratio * (box[3] - box[1])), frame)


def around(box: Box, size: tuple[float, float], frame: tuple[int, int]) -> Box:
    """The part within the frame of a box of this size (width, height) with the same centre."""
    left, top, right, bottom = box
    return (
        max(0, int((left + right - size[0]) / 2)),
        max(0, int((top + bottom - size[1]) / 2)),
        min(frame[0], int((left + right + size[0]) / 2)),
        min(frame[1], int((top + bottom + size[1]) / 2)),
    )


def _videos(content: dict[str, Any], frames: Path) -> list[list[Object]]:
    nouns = {each["id"]: each["name"].replace("_", " ") for each in content["categories"]}
    videos = {each["id"]: each for each in content["videos"]}
    objects: dict[int, list[Object]] = {}
    for each in content["annotations"]:
        video = videos[each["video_id"]]
        files = [frames.joinpath(*Path(name).parts[-2:]) for name in video["file_names"]]
        runs = [run_lengths(one, video["height"], video["width"]) for one in each["segmentations"]]
        masks = {file: one for file, one in zip(files, runs, strict=True) if one is not None}
        if len(masks) > 1:
            objects.setdefault(each["video_id"], []).append((nouns[each["category_id"]], masks))
    return list(objects.values())
