"""The run stores: folders below likeness in ComfyUI's user directory."""

import logging
from collections.abc import Callable
from pathlib import Path

import folder_paths
from torch import Tensor

from ..fit.runs import LIMIT_BYTES, RunStore

log = logging.getLogger("likeness")
LARGE_RUN = LIMIT_BYTES // 2  # bytes; larger runs have a separate folder, which keeps the newest


def run_store(size: int = 0) -> RunStore:
    """The store for a run of `size` bytes: small runs share a folder, which a large run would empty."""
    if size <= LARGE_RUN:
        return RunStore(_folder("runs"))
    return RunStore(_folder("large_runs"), size * 3 // 2)


def dedicated_store(name: str, size: int, runs: float = 1.5) -> RunStore:
    """A separate folder for one kind of run, with room for `runs` runs of `size` bytes each."""
    return RunStore(_folder(name), max(LIMIT_BYTES, int(runs * size)))


def kept(key: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is kept with the runs: made once for each key, which holds all that it depends on."""
    store = run_store()
    stored = store.load(key) or {}
    if "kept" not in stored:
        stored = {"kept": make().cpu()}
        try:
            store.save(key, stored, {})
        except OSError as problem:
            log.warning("What was computed could not be stored (%s).", problem)
    return stored["kept"]


def _folder(name: str) -> Path:
    return Path(folder_paths.get_user_directory()) / "likeness" / name
