"""The K x v grid of SINE (Zhang et al. 2023, arXiv 2212.04489, Fig. 7 to 9, 19 to 21): settings, and order of results.

v, the base_weight, is the base model's share of the guided prediction. K is where the guidance ends, here given as
end_percent of ComfyUI's schedule: 0.6 is the paper's K = 400 of 999. Rows of the grid are end_percents, columns are
base_weights.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import LAST_TIMESTEP

MOST_TEXT, MOST_NUMBERS, MOST_PAIRS = 2000, 24, 144
_NUMBER = r"[+-]?(\d{1,12}\.?\d{0,12}|\.\d{1,12})([eE][+-]?\d{1,2})?"


def numbers(text: str, name: str) -> list[float]:
    """'0.3, 0.5 0.7' -> [0.3, 0.5, 0.7], in this order. ValueError for anything but distinct numbers in 0..1."""
    if len(text) > MOST_TEXT:
        raise ValueError(f"{name} is a text of {len(text)} characters: give up to {MOST_NUMBERS} numbers.")
    values: list[float] = []
    for word in re.split(r"[\s,;]+", text.strip(" \t\r\n,;")):
        if not word:
            raise ValueError(f"{name} is empty: give numbers from 0 to 1, such as '0.3, 0.5, 0.7'.")
        if not re.fullmatch(_NUMBER, word, re.ASCII):
            raise ValueError(f"{name} holds {word[:40]!r}, which is not a number: write it like '0.3, 0.5, 0.7'.")
        value = float(word) + 0.0  # -0 becomes 0
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} holds {word[:40]}: give numbers from 0 to 1, with a point for the decimals.")
        if value in values:
            raise ValueError(f"{name} holds {value:g} twice: give each number once.")
        values.append(value)
    if len(values) > MOST_NUMBERS:
        raise ValueError(f"{name} holds {len(values)} numbers: give {MOST_NUMBERS} at most.")
    return values


def pairs(base_weights: Sequence[float], end_percents: Sequence[float]) -> list[tuple[float, float]]:
    """All (base_weight, end_percent) pairs in row-major order; the base weight varies fastest."""
    count = len(base_weights) * len(end_percents)
    if count > MOST_PAIRS:
        raise ValueError(
            f"{len(base_weights)} base weights x {len(end_percents)} end percents are {count} images: "
            f"{MOST_PAIRS} are possible. Give fewer numbers."
        )
    return [(weight, end) for end in end_percents for weight in base_weights]


def timestep(end_percent: float) -> int:
    """The paper's K for a percent, in SD's 1000 timesteps; for other schedules a fraction of 999."""
    return round((1.0 - end_percent) * LAST_TIMESTEP)


@dataclass(frozen=True)
class Grid:
    """The grid of results. places: index of the result at [row][column], or None."""

    base_weights: tuple[float, ...]
    end_percents: tuple[float, ...]
    places: tuple[tuple[int | None, ...], ...]

    def over_base_weight(self, values: Sequence[float]) -> list[list[tuple[float, float]]]:
        """The points (base_weight, value) for each end_percent."""
        rows = (zip(self.base_weights, row, strict=True) for row in self.places)
        return [[(x, values[at]) for x, at in row if at is not None] for row in rows]

    def over_end_percent(self, values: Sequence[float]) -> list[list[tuple[float, float]]]:
        """The points (end_percent, value) for each base_weight."""
        columns = tuple(zip(*self.places, strict=True))
        return Grid(self.end_percents, self.base_weights, columns).over_base_weight(values)


def grid(base_weights: Sequence[float], end_percents: Sequence[float]) -> Grid:
    """Sort results into the grid by their settings; result i belongs to base_weights[i] and end_percents[i]."""
    if len(base_weights) != len(end_percents) or not base_weights:
        raise ValueError(
            f"{len(base_weights)} base weights came with {len(end_percents)} end percents: connect both outputs of "
            "Sweep Guidance."
        )
    if len(base_weights) > MOST_PAIRS:
        raise ValueError(f"{len(base_weights)} pairs came: {MOST_PAIRS} are possible.")
    columns, rows = tuple(sorted(set(base_weights))), tuple(sorted(set(end_percents)))
    index: dict[tuple[float, float], int] = {}
    for i, pair in enumerate(zip(end_percents, base_weights, strict=True)):
        if pair in index:
            raise ValueError(f"The pair base_weight {pair[1]:g}, end_percent {pair[0]:g} came twice: give it once.")
        index[pair] = i
    return Grid(columns, rows, tuple(tuple(index.get((end, weight)) for weight in columns) for end in rows))


def of_each_pair(images: Sequence[Tensor], count: int) -> list[Tensor]:
    """Batches [B, H, W, C] -> `count` images [H, W, C]; several images of a pair become one, in rows that make about a
    square. ValueError for another number of images, or for several of different sizes.
    """
    singles = [image for batch in images for image in batch]
    each, rest = divmod(len(singles), count)
    if rest or not each or (each > 1 and len({image.shape for image in singles}) > 1):
        raise ValueError(
            f"{len(singles)} images came for {count} pairs: give the same number for each pair, all of one size."
        )
    columns = math.ceil(math.sqrt(each))
    blank = [torch.zeros_like(singles[0])] * (-each % columns)
    cells = [[*singles[i : i + each], *blank] for i in range(0, len(singles), each)]
    return [torch.cat([torch.cat(row, 1) for row in zip(*[iter(cell)] * columns, strict=True)]) for cell in cells]


def mean_of_each_pair(values: Sequence[float], count: int, title: str) -> list[float]:
    """One value for each image -> one for each of `count` pairs. ValueError for a number that is no multiple of it."""
    each, rest = divmod(len(values), count)
    if rest or not each:
        raise ValueError(
            f"{len(values)} values of {title} came for {count} pairs: give the same number for each pair, from images "
            "that are scored one by one."
        )
    return [sum(values[i : i + each]) / each for i in range(0, len(values), each)]
