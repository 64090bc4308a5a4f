"""The file of a fine-tune: weights as the shared LoRA artifact keeps them, and the position map that they need."""

from __future__ import annotations

from pathlib import Path

from ..lora.artifact import FineTunedWeights, read_fine_tune
from .position_map import MARKER, needed_map


def load_fine_tune(path: Path) -> FineTunedWeights:
    """As read_fine_tune(), for files that may need a position map. ValueError when the map is impossible."""
    tuned = read_fine_tune(path, (MARKER,))
    needed_map(tuned, path.name)
    return tuned


def summary(tuned: FineTunedWeights) -> str:
    """A few lines for people, the position map among them."""
    needed = needed_map(tuned)
    return tuned.describe(f"position map: {f'{needed[0]} cells, {needed[1]}' if needed else 'none'}")
