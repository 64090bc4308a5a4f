"""The samples of a run by number: a sample does not depend on the process or the time that requests it."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...core.ezigen.subject_pairs import EXPECTED, MAX_SUBJECTS, Pair, PairFolder, index_of, pair_generator
from .coco import Coco
from .youtube_vis import ANNOTATIONS, DRAWS, YoutubeVis

Source = Coco | YoutubeVis | PairFolder
"""A set of pairs. pair() replaces an unreadable pair by the next usable one, and notes it in `skipped`."""


@dataclass(frozen=True)
class Item:
    """A sample as it passes between processes: its pair, images in uint8, and the files that were skipped for it."""

    number: int
    pair: Pair
    skipped: list[str]


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
        self.seed = seed
        self.places = [(each, index) for each in sources for index in range(len(each))]

    def __getitem__(self, index: int) -> Item:
        pairs, place = self.places[index_of(self.seed, index, len(self.places))]
        before = len(pairs.skipped)
        pair = pairs.pair(place, pair_generator(self.seed, index))
        pair = replace(pair, target=_bytes(pair.target), subjects=_bytes(pair.subjects))
        return Item(index, pair, pairs.skipped[before:])


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

    def numbers(self, first: int, steps: int) -> Iterator[list[int]]:
        """The sample numbers of each of its batches in the updates from `first` to before `steps`."""
        start, end = first * self.total + self.rank * self.batch, steps * self.total
        return (list(range(at, at + self.batch)) for at in range(start, end, self.batch * self.processes))

    def batches(self, samples: PairDataset, first: int, steps: int, workers: int) -> Iterator[list[Item]]:
        """Its batches in these updates; `workers` processes read ahead."""
        loader = DataLoader(
            samples,
            batch_sampler=self.numbers(first, steps),
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=_ignore_signals,
        )
        return iter(loader)


def _ignore_signals(_worker: int) -> None:
    """Ignore interrupts: the training process handles them and stops the workers after saving."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
