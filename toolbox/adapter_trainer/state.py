"""The states of a run on disk: written atomically; the last few are kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.files import read_tensors, write_tensors

KIND, FORMAT = "adapter run", 1
PREFIX, ADAPTER = "state-", "adapter.safetensors"
MAX_BYTES = 64 << 30
log = logging.getLogger("likeness")


class States:
    """The states in a run's folder. settings: everything that determines the result; stored with each state."""

    def __init__(self, folder: Path, keep: int, settings: dict[str, Any]) -> None:
        self.folder, self.keep = folder, keep
        self.settings = json.loads(json.dumps(settings))

    def files(self) -> list[Path]:
        """The state files, the oldest first."""
        return sorted(self.folder.glob(f"{PREFIX}*.safetensors"))

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Save a state and remove old ones; OSError when the disk is full."""
        path = self.folder / f"{PREFIX}{step:09d}.safetensors"
        write_tensors(path, tensors, {"kind": KIND, "format": FORMAT, "settings": self.settings})
        for old in self.files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def newest(self, allow_changed: bool) -> dict[str, Tensor] | None:
        """The newest readable state, or None. ValueError when it has other settings."""
        for path in reversed(self.files()):
            try:
                tensors, header = read_tensors(path, MAX_BYTES)
                if header.get("kind") != KIND or header.get("format") != FORMAT or "losses" not in tensors:
                    raise ValueError(f"{path.name} is not the state of a run of this version.")
            except (ValueError, OSError) as error:
                log.warning("%s The state before it is taken.", error)
                continue
            self._check(header.get("settings", {}), allow_changed)
            return tensors
        if self.files():
            raise ValueError(
                f"No state in {self.folder} can be read: give another folder, or remove them to begin anew."
            )
        return None

    def _check(self, before: dict[str, Any], allow_changed: bool) -> None:
        changed = [name for name, value in self.settings.items() if before.get(name) != value]
        if not changed:
            return
        changes = "; ".join(
            "another model" if name == "base" else f"{name} was {before.get(name)}, is {self.settings[name]}"
            for name in changed
        )
        if not allow_changed:
            raise ValueError(
                f"The run in {self.folder} was begun with other settings ({changes[:1000]}): give the same, another "
                "folder with --out, or --allow-changed to go on with these."
            )
        log.warning(
            "The run goes on with other settings (%s): not what one begun with them would give.", changes[:1000]
        )


def share_state(accelerator: Any, state: dict[str, Tensor] | None, problem: str) -> dict[str, Tensor] | None:
    """Broadcast the first process's state to all processes, so that only its machine needs the folder.

    ValueError, in all processes, when the first one had a problem.
    """
    from accelerate.utils import broadcast, broadcast_object_list

    table = None if state is None else [(name, tuple(value.shape), value.dtype) for name, value in state.items()]
    (table, problem) = broadcast_object_list([table, problem])
    if problem:
        raise ValueError(problem)
    if table is None or accelerator.num_processes == 1:
        return state
    tensors = {}
    for name, shape, dtype in table:
        tensor = torch.empty(shape, dtype=dtype) if state is None else state[name]
        tensors[name] = broadcast(tensor.to(accelerator.device)).cpu()
    return tensors
