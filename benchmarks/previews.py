"""What the previews of Train Subject Embedding cost: its first run with them beside one without, and the same again.

The node itself is run on toyworld, in the process, with its defaults, a target and a new folder of runs each time. The
run without is the same one without the seconds in which previews were made: two runs of one length differ by more than
that. Seconds are those of the processor.

    python toolbox/_load.py benchmarks.previews --out benchmarks/results/previews.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import frame, subjects

GATES = {"first run": 1.05, "again": 0.01}


@dataclass(frozen=True)
class Settings:
    """The node's defaults; rounds: how often it is run."""

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

    def run(self) -> tuple[float, float, int]:
        """Seconds of one execution of the node, those of its previews, and how many there are."""
        from ..core.embedding.host import train
        from ..nodes import embedding

        used, images = [0.0], []
        made = train.preview_images

        def timed(*inputs: Any) -> torch.Tensor:
            begun = time.process_time()
            images.append(made(*inputs))
            used[0] += time.process_time() - begun
            return images[-1]

        begun = time.process_time()
        with torch.inference_mode(), mock.patch.object(train, "preview_images", timed):
            embedding.LikenessTrainEmbedding.PREPARE_CLASS_CLONE({}).execute(**self.inputs)
        return time.process_time() - begun, used[0], len(images[0])

    def figures(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Medians of the first run beside its part without previews, and of the run again beside the first."""
        firsts, agains = [], []
        for _ in range(self.settings.rounds):
            self.new_folder()
            firsts.append(self.run())
            agains.append(self.run()[0])
        whole, images = statistics.median(each[0] for each in firsts), firsts[0][2]
        ratio = statistics.median(each[0] / (each[0] - each[1]) for each in firsts)
        yield "first run", {"seconds": whole, "ratio": ratio, "images": images}
        again = statistics.median(agains)
        yield "again", {"seconds": again, "ratio": again / whole, "images": images}


def main(arguments: list[str]) -> int:
    """Print the table; exit 1 when a gate is missed."""
    run = frame.Run("previews", arguments, Settings(), threads=1)
    found = run.table(Bench(run.base, run.settings).figures())
    gates = {name: found[name]["ratio"] <= gate for name, gate in GATES.items()}
    return run.costs({**found, "settings": asdict(run.settings)}, gates)
