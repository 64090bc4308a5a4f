"""EZIGen's adapter trained by one or many processes: core's training, its gradients averaged by Accelerate."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.ezigen.artifact import StoredAdapter, read_adapter, save_adapter
from ...core.ezigen.train import AdapterTraining, Sample, TrainingSettings
from ...core.fit.fit import Fit
from ...core.fit.runs import RunStore
from ...core.fit.train import LOSSES, Checkpointer
from .data import Share
from .network import DiffusersUNet

ADAPTER = "adapter.safetensors"
WEIGHT = "fit.adapter."  # begins the names of the adapter's tensors in a state
MAX_BYTES = 64 << 30
PATIENCE = 10.0
log = logging.getLogger("likeness")


class SharedTraining(AdapterTraining):
    """One process's part of a training. The adapter is the same in all processes after every update."""

    def __init__(self, accelerator: Any, network: DiffusersUNet, settings: TrainingSettings, share: Share) -> None:
        super().__init__(network, network.adapter, lambda _numbers: next(self.batches), settings)
        self.accelerator, self.share = accelerator, share
        self.stop = 0.0  # when it was asked to stop
        self.batches: Generator[list[Sample]]
        """This process's samples from the current step on."""
        self.skipped: set[str] = set()
        """Data files that could not be read, with the reason."""

    @property
    def done(self) -> bool:
        """Whether any process was asked to stop."""
        if self.stop:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def gradient(self) -> tuple[Tensor, Tensor]:
        parts = [self.backward(numbers) for numbers in self.share.numbers(self.step, self.step + 1)]
        loss = torch.stack([loss for loss, _ in parts]).mean()
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        loss, *means = self.accelerator.reduce([loss, *gradients], "mean")
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean / len(parts))
        return loss, parts[0][1]

    @contextlib.contextmanager
    def stops_on_signals(self) -> Iterator[None]:
        """Stop after the current update on Ctrl+C or a scheduler's SIGTERM.

        A second request after PATIENCE seconds ends the process at once, without saving. Earlier ones are ignored,
        because Accelerate's launcher forwards the signal that the terminal has already sent to every process.
        """

        def on_signal(number: int, _frame: object) -> None:
            if not self.stop:
                log.warning("Asked to stop (%s): the update is finished and saved first.", signal.Signals(number).name)
                self.stop = time.monotonic()
            elif time.monotonic() - self.stop > PATIENCE:
                os._exit(128 + number)

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class States(RunStore):
    """The last states of a run, and its adapter, in a folder that only the first process reads and writes."""

    def __init__(self, accelerator: Any, out: Path, keep: int, header: dict[str, Any], allow_changed: bool) -> None:
        """header: of the adapter; its `settings` determine the result."""
        super().__init__(out / "states", MAX_BYTES)
        self.accelerator, self.adapter, self.most = accelerator, out / ADAPTER, keep
        self.header, self.allow_changed = header, allow_changed
        self.stored_step = 0
        """Up to which step both the states and the adapter are on disk."""

    def load(self, key: str, choose: Callable[[list[str]], list[str]] = list) -> dict[str, Tensor] | None:
        """The newest state, in all processes, or None before the first; key and choose are ignored.

        ValueError, in all processes, when it has other settings, or none can be read.
        """
        from accelerate.utils import broadcast_object_list

        answer: Any = None
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                answer = self._newest() if self.adapter.is_file() else None
            except (ValueError, OSError) as error:
                answer = error
        (answer,) = broadcast_object_list([answer])
        if isinstance(answer, Exception):
            raise ValueError(str(answer)) from answer
        return answer

    def save(self, key: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        """Store a state, the adapter in it, and remove old states; key and header are ignored."""
        step = len(tensors[LOSSES])
        if not self.accelerator.is_main_process or step == self.stored_step:
            return
        super().save(f"{step:09d}", tensors, {})
        for old in sorted(self.folder.glob("*.safetensors"))[: -self.most]:
            old.unlink(missing_ok=True)
        weights = {name.removeprefix(WEIGHT): value for name, value in tensors.items() if name.startswith(WEIGHT)}
        save_adapter(self.adapter, StoredAdapter(weights, {**self.header, "steps": step}))
        self.stored_step = step

    def _newest(self) -> dict[str, Tensor]:
        stored = read_adapter(self.adapter).header
        before = stored.get("settings", {})
        changes = [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in self.header["settings"].items()
            if before.get(name) != value
        ]
        text = "; ".join(changes)[:1000]
        if changes and not self.allow_changed:
            raise ValueError(
                f"The run in {self.adapter.parent} was begun with other settings ({text}): give the same, another "
                "folder with --out, or --allow-changed to go on with these."
            )
        if changes:
            log.warning("The run goes on with other settings (%s): not what one begun with them would give.", text)
        for path in sorted(self.folder.glob("*.safetensors"), reverse=True):
            tensors = super().load(path.stem)
            if tensors is not None:
                self.stored_step = min(stored.get("steps", 0), len(tensors[LOSSES]))
                return tensors
        raise ValueError(
            f"{self.adapter} is there, and no state in {self.folder} can be read: give another folder with --out, or "
            "remove this one to begin anew."
        )


class RegularCheckpointer(Checkpointer):
    """Saves after a number of updates instead of a time."""

    def save_if_due(self, fit: Fit) -> None:
        if fit.step % self.retention.every == 0:
            self.save(fit)
