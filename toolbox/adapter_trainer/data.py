"""The samples of a run by number: a sample does not depend on the process or the time that requests it."""

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
    """A set of pairs. pair() replaces an unreadable pair by the next usable one, and notes it in `skipped`."""

    skipped: list[str]

    def __len__(self) -> int: ...

    def pair(self, index: int, generator: torch.Generator) -> Pair: ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Item:
    """A pair in the form passed between processes: uint8 images, [3, S, S] and [R, 3, S, S]."""

    number: int
    target: Tensor
    caption: str
    subjects: Tensor
    classes: list[str]
    problems: list[str]
    """Files that could not be read on the way to it."""


def source(path: Path, size: int, max_subjects: int = MAX_SUBJECTS, images: int = 0, draws: int = DRAWS) -> Source:
    """The dataset in a folder, recognised by its files. ValueError, which says what is expected, if there is none."""
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


class PairDataset(Dataset[Item]):
    """The samples of a run over several sets; each pass takes every pair of every set once, in its own order."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.ends = list(itertools.accumulate(map(len, sources)))

    def __getitem__(self, index: int) -> Item:
        """Sample number `index` of the run."""
        number = index
        place = index_of(self.seed, number, self.ends[-1])
        which = bisect.bisect_right(self.ends, place)
        pairs = self.sources[which]
        before = len(pairs.skipped)
        first = self.ends[which - 1] if which else 0
        pair = pairs.pair(place - first, step_generator(self.seed, number, "pair"))
        target, subjects = (_bytes(images) for images in (pair.target, pair.subjects))
        return Item(number, target, pair.caption, subjects, pair.classes, pairs.skipped[before:])


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Share:
    """The share of one process of a run: `batch` samples at once, `accumulate` times per update."""

    batch: int
    accumulate: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def total(self) -> int:
        """Samples per update, over all processes."""
        return self.batch * self.accumulate * self.processes

    def numbers(self, step: int) -> list[list[int]]:
        """The sample numbers of its batches in an update."""
        firsts = [
            step * self.total + (turn * self.processes + self.rank) * self.batch for turn in range(self.accumulate)
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


def batches(samples: PairDataset, share: Share, first: int, steps: int, workers: int) -> Iterator[list[list[Item]]]:
    """This process's batches for each update from `first` on; `workers` processes read ahead."""
    loader = DataLoader(
        samples,
        batch_sampler=_Numbers(share, first, steps),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else the workers' (unused) seeds are drawn from the global generator
    )
    iterator = iter(loader)
    for _ in range(first, steps):
        yield list(itertools.islice(iterator, share.accumulate))


def _ignore_signals(_worker: int) -> None:
    """Ignore interrupts: the training process handles them and stops the workers after saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
