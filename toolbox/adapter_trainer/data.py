"""The samples of a run by their numbers: which process asks for one, or when, changes nothing about it."""

from __future__ import annotations

import bisect
import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...core.ezigen.subject_pairs import EXPECTED, MAX_SUBJECTS, Pair, PairFolder, index_of
from ...core.fit.fit import step_generator
from .data_coco import Coco
from .data_youtube_vis import ANNOTATIONS, DRAWS, YoutubeVis


class Source(Protocol):
    """A set of pairs. pair() takes the next usable one for one that cannot be read, and says so in `skipped`."""

    skipped: list[str]

    def __len__(self) -> int: ...

    def pair(self, index: int, generator: torch.Generator) -> Pair: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Item:
    """A pair as it travels between processes: images of bytes, [3, S, S] and [R, 3, S, S]."""

    number: int
    target: Tensor
    caption: str
    subjects: Tensor
    classes: list[str]
    problems: list[str]
    """What could not be read on the way to it."""


def source(path: Path, size: int, max_subjects: int = MAX_SUBJECTS, images: int = 0, draws: int = DRAWS) -> Source:
    """The set in a folder, told by what lies in it. ValueError, with what was expected, when there is none."""
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {path.name}: give one of COCO (with annotations/), of YouTube-VIS (with "
            f"{ANNOTATIONS[0]}), or of subjects ({EXPECTED})."
        )
    if any((path / name).is_file() for name in ANNOTATIONS):
        return YoutubeVis(path, size, draws)
    if (path / "annotations").is_dir():
        return Coco(path, size, max_subjects, images)
    return PairFolder(path, size, max_subjects)


class Samples(Dataset[Item]):
    """Sample `number` of a run over several sets: each pass takes every pair of every set once, in its own order."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __getitem__(self, index: int) -> Item:
        """Sample number `index` of the run."""
        number = index
        place = index_of(self.seed, number, self.ends[-1])
        which = bisect.bisect_right(self.ends, place)
        chosen = self.sources[which]
        before = len(chosen.skipped)
        begin = self.ends[which - 1] if which else 0
        pair = chosen.pair(place - begin, step_generator(self.seed, number, "pair"))
        target, subjects = (_bytes(images) for images in (pair.target, pair.subjects))
        return Item(number, target, pair.caption, subjects, pair.classes, chosen.skipped[before:])


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Share:
    """What one process of a run does: `batch` samples at once, `accumulate` times for each update."""

    batch: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def whole(self) -> int:
        """Samples of an update, of all processes."""
        return self.batch * self.accumulate * self.processes

    def numbers(self, step: int) -> list[list[int]]:
        """Its batches of an update."""
        firsts = [
            step * self.whole + (turn * self.processes + self.rank) * self.batch for turn in range(self.accumulate)
        ]
        return [list(range(first, first + self.batch)) for first in firsts]


class _Numbers(Sampler[list[int]]):
    def __init__(self, share: Share, first: int, steps: int) -> None:
        self.share, self.steps = share, range(first, steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from self.share.numbers(step)

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulate


def batches(samples: Samples, share: Share, first: int, steps: int, workers: int) -> Iterator[list[list[Item]]]:
    """For each update from `first` on, the batches that this process learns from; read ahead by `workers` processes."""
    loader = DataLoader(
        samples,
        batch_sampler=_Numbers(share, first, steps),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_undisturbed,
        generator=torch.Generator(),  # it draws the workers' seeds, which nothing uses, from the global one otherwise
    )
    found = iter(loader)
    for _ in range(first, steps):
        yield list(itertools.islice(found, share.accumulate))


def _undisturbed(_worker: int) -> None:
    """An interrupt is for the process that trains: it stops the workers when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
