"""The training loop of EZIGen's adapter in one or many processes (the mathematics is in core/ezigen/train.py)."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.ezigen.adapter import Adapter
from ...core.ezigen.train import MAX_NORM, Draw, Sample, draw, errors, optimizer
from ...core.fit.fit import adam_state, finite_or_raise, restore_adam
from .base import Encoder
from .data import Item
from .network import DiffusersUNet

PATIENCE = 10.0
log = logging.getLogger("likeness")


class Errors(nn.Module):
    """The errors of a batch as a module, which Accelerate distributes over processes; its weights are the adapter's."""

    def __init__(self, network: DiffusersUNet, adapter: Adapter) -> None:
        super().__init__()
        self.adapter, self.network = adapter, network

    def forward(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Tensor:
        return errors(self.network, samples, draws)


class Training:
    """The adapter, its optimiser and its losses; identical in all processes after every update."""

    def __init__(
        self, accelerator: Any, network: DiffusersUNet, encoder: Encoder, seed: int, learning_rate: float, drop: float
    ) -> None:
        self.accelerator, self.network, self.encoder = accelerator, network, encoder
        self.seed, self.drop = seed, drop
        self.parameters = network.adapter.published_parameters()
        self.optimizer = optimizer(self.parameters, learning_rate)
        self.module = accelerator.prepare_model(Errors(network, network.adapter))
        self.losses: list[float] = []
        self.consistent = True
        """False in the last part of an update, where the state is neither the previous nor the next one."""

    @property
    def step(self) -> int:
        return len(self.losses)

    def update(self, batches: list[list[Item]], stop: bool) -> bool:
        """One update with this process's batches; returns whether any process was asked to stop.

        RuntimeError, without any change of state, when the loss or its gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for turn, items in enumerate(batches):
            samples = self.encoder.samples(items)
            draws = [draw(self.seed, item.number, self.drop) for item in items]
            with contextlib.ExitStack() as stack:
                if turn + 1 < len(batches):
                    stack.enter_context(self.accelerator.no_sync(self.module))
                loss = self.module(samples, draws).mean() / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        reduced = self.accelerator.reduce(torch.stack([total, total.new_tensor(float(stop))]), "mean")
        value = finite_or_raise(reduced[0], self.step)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        finite_or_raise(norm, self.step, "gradient")
        self.consistent = False
        self.optimizer.step()
        self.losses.append(value)
        self.consistent = True
        return bool(reduced[1] > 0)

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"adapter.{name}": parameter.detach() for name, parameter in self.parameters.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **adam_state(self.optimizer),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a state(); ValueError when it belongs to another adapter."""
        tensors = {name.removeprefix("adapter."): value for name, value in state.items() if name.startswith("adapter.")}
        self.network.adapter.load(tensors)
        restore_adam(self.optimizer, state)
        self.losses = state["losses"].tolist()


class StopRequest:
    """Whether Ctrl+C or a scheduler has asked the run to stop.

    A second request after PATIENCE seconds stops it at once, without saving. Earlier ones are ignored, because
    Accelerate's launcher forwards the signal that the terminal has already sent to every process.
    """

    def __init__(self) -> None:
        self.stop, self._time = False, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stop:
            if time.monotonic() - self._time > PATIENCE:
                raise KeyboardInterrupt
            return
        self._time = time.monotonic()
        log.warning("Asked to stop (%s): the update is finished and saved first.", signal.Signals(number).name)
        self.stop = True


class Problems:
    """Unreadable files in this process: each is logged once, and counted."""

    def __init__(self) -> None:
        self.messages: set[str] = set()

    def add(self, items: list[list[Item]]) -> None:
        for batch in items:
            for item in batch:
                for problem in item.problems:
                    if problem not in self.messages:
                        self.messages.add(problem)
                        log.warning("Skipped: %s", problem)

    def count(self) -> int:
        """The number in all processes together."""
        from accelerate.utils import gather_object

        return len(set(gather_object(sorted(self.messages))))


def run_training(
    training: Training,
    updates: Iterator[list[list[Item]]],
    steps: int,
    save_every: int,
    save: Callable[[], None],
    on_update: Callable[[int, float], None],
    problems: Problems,
) -> bool:
    """Train up to `steps` updates, saving on the way and at the end; returns False if it was asked to stop earlier.

    on_update(step, loss) is called after every update.
    """
    saved_step = training.step
    with StopRequest().listening() as request:
        try:
            for batches in updates:
                problems.add(batches)
                stop = training.update(batches, request.stop)
                if stop or training.step == steps or training.step % save_every == 0:
                    save()
                    saved_step = training.step
                on_update(training.step, training.losses[-1])
                if stop:
                    break
        except Exception:  # from the data too: a dead worker, an unmounted folder
            if training.consistent and training.step > saved_step:
                save()  # the failed update has changed nothing
            raise
    return training.step >= steps


class ProgressLog:
    """Log lines with the mean loss since the previous line, the speed and the remaining time."""

    def __init__(self, first: int, steps: int, every: int) -> None:
        self.first, self.steps, self.every = first, steps, every
        self.began, self.recent = time.monotonic(), list[float]()

    def __call__(self, step: int, loss: float) -> None:
        self.recent.append(loss)
        if step % self.every and step != self.steps:
            return
        speed = (step - self.first) / (time.monotonic() - self.began)
        left = (self.steps - step) / speed / 3600
        mean = sum(self.recent) / len(self.recent)
        log.info("%d of %d: loss %.4f, %.2f updates/s, %.1f h left", step, self.steps, mean, speed, left)
        self.recent.clear()
