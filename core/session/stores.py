"""Where runs are kept: folders below likeness in ComfyUI's user directory."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..fit.runs import LIMIT_BYTES, RunStore

LARGE_RUN = LIMIT_BYTES // 2  # bytes; larger runs have a folder of their own, which keeps the newest


def run_store(size: int = 0) -> RunStore:
    """The store for a run of so many bytes: small runs share one folder, which a large one would empty."""
    if size <= LARGE_RUN:
        return RunStore(_folder("runs"))
    return RunStore(_folder("large_runs"), size * 3 // 2)


def own_store(name: str, size: int, runs: float = 1.5) -> RunStore:
    """A folder for one kind of run, with room for `runs` of them when each has so many bytes."""
    return RunStore(_folder(name), max(LIMIT_BYTES, int(runs * size)))


def _folder(name: str) -> Path:
    return Path(folder_paths.get_user_directory()) / "likeness" / name
