"""Runs on disk: what was trained once is not trained again, and what was stopped goes on where it stopped.

A run is one safetensors file named by the sha256 of everything that decides its result except the number of steps. It
holds the state after its last update, and the rows kept on the way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_tensors, write_tensors

LIMIT_BYTES = 2 << 30
LEFTOVER_SECONDS = 86_400
log = logging.getLogger("likeness")


def digest(value: Any) -> str:
    """sha256 of a nest of plain values and tensors; equal nests give equal digests on every machine."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        sha.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(sha, str(key))
            _feed(sha, value[key])
    elif isinstance(value, (list, tuple)):
        sha.update(f"list {len(value)};".encode())
        for item in value:
            _feed(sha, item)
    else:
        text = json.dumps(value, default=_name).encode()
        sha.update(f"value {len(text)};".encode() + text)


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class RunStore:
    """A folder of runs, the oldest removed when it grows beyond a limit."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def load(self, key: str, choose: Callable[[list[str]], list[str]] = list) -> dict[str, Tensor] | None:
        """The tensors of a run, all or the chosen ones; or None. A damaged file is removed and counts as absent.

        A file above the limit is the store's own, too: save() leaves the newest run whatever its size.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        tensors: dict[str, Tensor] | None
        try:
            tensors, _ = read_tensors(path, max(self.limit_bytes, path.stat().st_size), choose)
        except ValueError as error:
            log.warning("A stored run could not be read and starts anew: %s", str(error))
            tensors = None
        # What is read is a view of the file, and Windows neither replaces nor removes a file while one of them lives,
        # as it does in the error above.
        if tensors is None:
            path.unlink(missing_ok=True)
            return None
        path.touch()  # the most recently used runs are the last to be removed
        return {name: value.clone() for name, value in tensors.items()}

    def save(self, key: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        write_tensors(self.path(key), tensors, header)
        self._remove_oldest(keep=self.path(key))

    def _remove_oldest(self, keep: Path) -> None:
        for left in self.folder.glob("*.tmp"):  # of a process that was killed while writing
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:
                left.unlink(missing_ok=True)
        runs = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in runs)
        for path in runs:
            if size <= self.limit_bytes:
                return
            if path != keep:
                size -= path.stat().st_size
                path.unlink(missing_ok=True)
