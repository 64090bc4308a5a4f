"""Runs on disk: a finished training is not repeated, and an interrupted one resumes where it stopped.

A run is one safetensors file, named by the sha256 of everything that determines its result except the number of steps.
It holds the state after the last update and the intermediate results saved along the way.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_tensors, write_tensors

LIMIT_BYTES = 2 << 30  # of one folder; session/stores.py derives from it which folder a run belongs to
log = logging.getLogger("likeness")


def digest(value: Any) -> str:
    """sha256 of nested plain values and tensors; equal input gives equal digests on every machine."""
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
        text = json.dumps(value, default=lambda each: f"{type(each).__module__}.{type(each).__qualname__}").encode()
        sha.update(f"value {len(text)};".encode() + text)


class RunStore:
    """A folder of runs; the oldest are removed when it exceeds a size limit."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def load(self, key: str, choose: Callable[[list[str]], list[str]] = list) -> dict[str, Tensor] | None:
        """The tensors of a run, all or those selected by `choose`; or None. A damaged file is removed and counts as
        absent.

        A file above the limit is valid too: save() keeps the newest run whatever its size.
        """
        path = self.path(key)
        tensors: dict[str, Tensor] | None = None
        try:
            tensors, _ = read_tensors(path, max(self.limit_bytes, path.stat().st_size), choose)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("A stored run could not be read and is trained again: %s", str(error))
            if isinstance(error, OSError):  # of the disk, or of rights: the file may be whole
                return None
        # The tensors are views of the file; the error above may still hold some, and Windows cannot replace or remove a
        # file while a view of it exists.
        with contextlib.suppress(OSError):  # a folder that can only be read serves its runs as well
            if tensors is None:
                path.unlink()
            else:
                os.utime(path)  # the most recently used runs are the last to be removed
        return None if tensors is None else {name: value.clone() for name, value in tensors.items()}

    def save(self, key: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Older runs make room on a full disk. OSError when there is none without them, or for any other reason."""
        while True:
            try:
                write_tensors(self.path(key), tensors, header, checksums=True)
                break
            except OSError as error:
                others = [path for path in self._by_age() if path != self.path(key)]
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not others:
                    raise
                log.warning("The oldest stored run is removed: there is no room for the new one.")
                others[0].unlink(missing_ok=True)
        sizes = self._by_age()
        total = sum(sizes.values())
        for path, size in sizes.items():
            if total > self.limit_bytes and path != self.path(key):
                total -= size
                path.unlink(missing_ok=True)

    def _by_age(self) -> dict[Path, int]:
        """The runs, the oldest first, with their sizes; another process may remove some meanwhile."""
        stats = {}
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                stats[path] = path.stat()
        return {path: stats[path].st_size for path in sorted(stats, key=lambda path: stats[path].st_mtime)}
