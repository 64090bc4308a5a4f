"""Does SINE's position map keep a patch-tuned model from drawing its subject twice at twice the width?

For each held-out subject of toyworld a copy of the model is fine-tuned on patches of one 96 x 96 px image, by the
pack's own code, and images of 192 x 96 px are sampled from the same noise with the position map and, from the very same
weights, without it: by the tuned model alone under its training prompt, and under its guidance with the edit prompt of
effect_sine.py. The judge marks the subject; what counts is the number of connected components, each above 4 % of the
image. More than one is a duplicate.

    python toolbox/_load.py benchmarks.wide_sine --out benchmarks/results/wide_sine.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import effect_sine, frame
from .effect_sine import Edit
from .subjects import SIDE

SMALLEST = 0.04
SQUARE = effect_sine.Settings.samples  # images of the usual size


@dataclass(frozen=True)
class Settings(effect_sine.Settings):
    """All weights, tuned on patches; the whole image in half of the steps."""

    method: str = "full weights"
    steps: int = 1000
    learning_rate: float = 1e-3
    patches: bool = True
    whole_image: float = 0.5
    samples: int = 6
    width: int = 192


def components(mask: Any) -> int:
    """Connected parts of a mask [H, W] of 0..1, each above SMALLEST of the image."""
    from scipy import ndimage

    parts, count = ndimage.label((mask > 0.5).numpy())
    sizes = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
    return int((sizes > SMALLEST * parts.size).sum()) if count else 0


class Bench(effect_sine.Bench):
    """Counts subjects in wide images."""

    settings: Settings

    def counted(self, images: Any) -> dict[str, float]:
        """Mean number of subjects, and of those beyond the first; the share of images with exactly one."""
        found = [components(mask) for mask in self.mask(images)]
        return {
            "subjects": frame.mean(found),
            "duplicates": frame.mean(max(0, count - 1) for count in found),
            "exactly one": frame.mean(count == 1 for count in found),
        }

    def row_of(self, edit: Edit) -> dict[str, Any]:
        """One subject, with and without the map; the base alone and two constructed images as references."""
        from ..core.sine.host.position_map import without_position_map

        def drawn(model: Any, prompt: str) -> dict[str, float]:
            return self.counted(self.images(model, edit, prompt, width=self.settings.width))

        tuned = self.tune(edit)
        bare = without_position_map(tuned)
        source = self.image(edit.case).movedim(-1, 1)
        stretched = torch.nn.functional.interpolate(source, (SIDE, self.settings.width), mode="bicubic").clamp(0, 1)
        square = self.sampled(tuned, self.conditioning(edit.training_prompt), edit.seed, self.settings, SQUARE)
        return {
            "tuned, map": drawn(tuned, edit.training_prompt),
            "tuned, no map": drawn(bare, edit.training_prompt),
            "guided, map": drawn(self.guided(edit, tuned), edit.prompt),
            "guided, no map": drawn(self.guided(edit, bare), edit.prompt),
            "base": drawn(self.world.model, edit.prompt),
            "source stretched": self.counted(stretched),
            "source twice": self.counted(torch.cat([source, source], 3)),
            "tuned, map, 96 px": self.scored(edit, square),
        }


def summary(rows: frame.Rows) -> dict[str, Any]:
    """Means, and paired intervals of the map's difference."""
    less = {way: frame.gain(rows, f"{way}, map", f"{way}, no map", "duplicates") for way in ("tuned", "guided")}
    result = {"subjects": len(rows), "mean": frame.means(rows), "duplicates with minus without map": less}
    return {**result, "gates held": less["tuned"]["high"] < 0}


def main(arguments: list[str]) -> int:
    """Print and write the figures; exit 1 when the gate is missed."""
    run = frame.Run("wide_sine", arguments, Settings(), subjects=16)
    rows = run.rows(run.chosen(effect_sine.edits), lambda: Bench(run.settings), Bench.row_of)
    return run.judged(rows, summary(rows))
