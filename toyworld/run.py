"""Start one stage of the small world's training or measuring: `python toyworld/run.py <stage> [--steps N] ...`.

Stages: data, ae, latents, crops, judge, unet, encoders, scorer, pairs, adapter, check, flow, teacher, student, gates,
export, build, measure, peek.
Training stages run in `--ranks` processes with one thread each (faster than one process with as many threads) and
continue from their saved state. The environment variable COMFYUI_PATH names a ComfyUI tree; work files lie in
.sandbox/toyworld, or where TOYWORLD_WORK says.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "data": "dataset", "ae": "train_ae", "latents": "latents", "crops": "subjects", "judge": "train_judge",
    "unet": "train_unet", "encoders": "train_encoders", "scorer": "train_scorer", "export": "export",
    "pairs": "pairs", "adapter": "train_adapter", "check": "check_adapter",
    "flow": "train_flow", "teacher": "teacher_pairs", "student": "train_student", "gates": "gates",
    "build": "build", "measure": "measure", "peek": "peek",
}  # fmt: skip
PARALLEL = ("ae", "judge", "unet", "encoders", "scorer", "adapter", "flow", "student")


def load_toyworld(module: str) -> types.ModuleType:
    """Import `toyworld.<module>` inside the package `likeness`, without running the pack's own `__init__`.

    ComfyUI has a module called `nodes`, so the project root must stay off `sys.path`.
    """
    if "likeness" not in sys.modules:
        package = types.ModuleType("likeness")
        package.__path__ = [str(ROOT)]
        sys.modules["likeness"] = package
    return importlib.import_module(f"likeness.toyworld.{module}")


def run_ranks(arguments: list[str], ranks: int) -> int:
    """Run this script `ranks` times, each process knowing its own rank, and return the first bad exit code."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                "TOYWORLD_RANK": str(rank),
                "TOYWORLD_RANKS": str(ranks),
                "TOYWORLD_MEETING": str(Path(folder) / "meeting"),
            }
            processes.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))
        return next((code for code in [process.wait() for process in processes] if code), 0)


def main() -> int:
    """Dispatch to the stage's module."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in STAGES:
        sys.exit(f"Give one stage: {', '.join(STAGES)}.")
    stage = arguments[0]
    if stage in PARALLEL and "TOYWORLD_RANK" not in os.environ:
        ranks = 2
        if "--ranks" in arguments:
            at = arguments.index("--ranks")
            ranks = int(arguments[at + 1])
            del arguments[at : at + 2]
        return run_ranks(arguments, ranks)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "toyworld")]
    load_toyworld(STAGES[stage]).main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
