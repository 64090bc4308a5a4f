"""What the previews of Train Subject Embedding cost: its first run with them beside one without, and the same again.

The node itself is run on toyworld, in the process, with its defaults and a new folder of runs each time. A target is
connected in both, so both show the subject so far; the run without a target does not. Seconds are those of the
processor.

    python toolbox/_load.py benchmarks.previews --out benchmarks/results/previews.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import frame, subjects

GATES = {"first run": 1.05, "again": 0.01}


@dataclass(frozen=True)
class Settings:
    """The node's defaults; rounds: how often each is run, by turns."""

    steps: int = 1000
    learning_rate: float = 5e-3
    preview_steps: int = 20
    preview_cfg: float = 7.5
    rounds: int = 3


class Bench(subjects.Bench):
    """The node on toyworld's generator, with one image of a subject."""

    def __init__(self, base: Path, settings: Settings) -> None:
        super().__init__()
        case = subjects.cases(1)[0]
        self.base, self.settings, self.folders = base, settings, 0
        self.inputs = {
            **{name: getattr(settings, name) for name in ("steps", "learning_rate", "preview_steps", "preview_cfg")},
            **{"model": self.world.model, "vae": self.world.vae, "image": self.image(case), "seed": 0, "tokens": 5},
            **{"positive": self.conditioning(case.prompt(case.source_place)), "negative": self.conditioning("")},
            **{"target": self.conditioning(case.prompt(case.target_place)), "save_every": 100},
            **{"init": "source prompt", "start_percent": 0.0, "end_percent": 1.0},
        }

    def new_folder(self) -> None:
        """Nothing is stored in it."""
        import folder_paths

        self.folders += 1
        folder_paths.set_user_directory(str(self.base / f"user{self.folders}"))

    def run(self, **more: Any) -> tuple[float, int]:
        """Seconds of one execution of the node, and the number of its previews."""
        from ..nodes.embedding import LikenessTrainEmbedding

        begun = time.process_time()
        with torch.inference_mode():
            images = LikenessTrainEmbedding.PREPARE_CLASS_CLONE({}).execute(**self.inputs | more).args[2]
        return time.process_time() - begun, len(images) if isinstance(images, torch.Tensor) else 0

    def figures(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Medians: the run without previews, with them, the latter again, and the run without previews and target."""
        ways = {"without": {"preview_steps": 0}, "first run": {}, "no target": {"preview_steps": 0, "target": None}}
        seconds: dict[str, list[float]] = {name: [] for name in (*ways, "again")}
        images = 0
        for turn in range(self.settings.rounds):
            for name in ways if turn % 2 else reversed(ways):
                self.new_folder()
                seconds[name].append(self.run(**ways[name])[0])
                if name == "first run":
                    used, images = self.run(**ways[name])
                    seconds["again"].append(used)
        medians = {name: statistics.median(used) for name, used in seconds.items()}
        for name, base in (("first run", "without"), ("again", "first run"), ("no target", "without")):
            yield name, {"seconds": medians[name], "ratio": medians[name] / medians[base], "images": images}


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("previews", arguments, Settings(), threads=1)
    found = run.table(Bench(run.base, run.settings).figures())
    gates = {name: found[name]["ratio"] <= gate for name, gate in GATES.items()}
    return run.costs({**found, "settings": asdict(run.settings)}, gates)
