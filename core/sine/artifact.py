"""The file of a fine-tuned model: weights in the shared LoRA artifact, plus the position map that they need."""

from pathlib import Path

from ..lora.artifact import FineTunedWeights, read_fine_tune
from ..lora.timestep_rank import MARKER as RANKS
from .position_map import MARKER, needed_map


def load_fine_tune(path: Path) -> FineTunedWeights:
    """As read_fine_tune(), for files that may need a position map. ValueError for an impossible map."""
    tuned = read_fine_tune(path, (MARKER, RANKS))
    needed_map(tuned, path.name)
    return tuned


def summary(tuned: FineTunedWeights) -> str:
    needed = needed_map(tuned)
    ranks = ["ranks: fewer at noisier timesteps (T-LoRA)"] if RANKS in tuned else []
    return tuned.describe(*ranks, f"position map: {f'{needed[0]} cells, {needed[1]}' if needed else 'none'}")
