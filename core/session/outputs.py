"""Blocked outputs, loss maps for the stock loss graph, and paths of output files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths
from comfy_execution.graph_utils import ExecutionBlocker

MAX_PREFIX = 200  # characters; file systems limit a name to 255


def nothing() -> ExecutionBlocker:
    """The value of an unused output: nodes connected to it are silently skipped."""
    return ExecutionBlocker(None)


def loss_map(losses: Sequence[float]) -> dict[str, list[float]]:
    """A LOSS_MAP of at least one loss. The stock Plot Loss Graph divides by the range, so equal losses get one more."""
    values = [float(loss) for loss in losses]
    if max(values) == min(values):
        values.append(values[-1] + 1e-6 * max(1.0, abs(values[-1])))
    return {"loss": values}


def numbered_path(folder: str, prefix: str, suffix: str) -> Path:
    """Path of a new file <prefix>_<number>_<suffix> in `folder`; prefix may contain sub-folders and ComfyUI's %date%
    tokens.

    ValueError for anything that would leave the folder, also through links.
    """
    parts = PurePosixPath(prefix.replace("\\", "/")).parts
    hostile = "\0" in prefix or ".." in parts or PurePosixPath(prefix).is_absolute() or PureWindowsPath(prefix).anchor
    if hostile or not parts or len(prefix) > MAX_PREFIX or ":" in prefix.replace("%date:", ""):
        raise ValueError(
            f"The file name {prefix[:80]!r} is not a plain name below the pack's folder: use letters, digits and '/'."
        )
    os.makedirs(folder, exist_ok=True)
    root = os.path.realpath(folder)
    _refuse_outside(root, os.path.join(root, os.path.dirname(prefix)), prefix)
    directory, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    path = os.path.join(directory, f"{name}_{counter:05}_{suffix}")
    _refuse_outside(root, path, prefix)
    return Path(path)


def _refuse_outside(root: str, path: str, prefix: str) -> None:
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ValueError(f"The file name {prefix[:80]!r} leads outside of the pack's folder: choose a plain name.")
