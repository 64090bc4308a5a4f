"""The training of EZIGen's adapter by one or many processes (core/ezigen_training.py has the mathematics)."""

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
    """The errors of a batch, as a module: what Accelerate spreads over processes, with the adapter as its weights."""

    def __init__(self, network: DiffusersUNet, adapter: Adapter) -> None:
        super().__init__()
        self.adapter, self.network = adapter, network

    def forward(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Tensor:
        return errors(self.network, samples, draws)


class Training:
    """The adapter, its optimiser and the curve of its losses; the same in all processes behind every update."""

    def __init__(
        self, accelerator: Any, network: DiffusersUNet, encoder: Encoder, seed: int, learning_rate: float, drop: float
    ) -> None:
        self.accelerator, self.network, self.encoder = accelerator, network, encoder
        self.seed, self.drop = seed, drop
        self.parameters = network.adapter.published_parameters()
        self.optimizer = optimizer(self.parameters, learning_rate)
        self.module = accelerator.prepare_model(Errors(network, network.adapter))
        self.losses: list[float] = []
        self.whole = True
        """False within an update's last part, where the state is neither the one before nor the one behind it."""

    @property
    def step(self) -> int:
        return len(self.losses)

    def update(self, found: list[list[Item]], stop: bool) -> bool:
        """One update with this process's batches; whether any process was asked to stop.

        RuntimeError, with everything as it was before, when the loss or its gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for turn, items in enumerate(found):
            samples = self.encoder.samples(items)
            draws = [draw(self.seed, item.number, self.drop) for item in items]
            with contextlib.ExitStack() as alone:
                if turn + 1 < len(found):
                    alone.enter_context(self.accelerator.no_sync(self.module))
                loss = self.module(samples, draws).mean() / len(found)
                self.accelerator.backward(loss)
            total += loss.detach()
        told = self.accelerator.reduce(torch.stack([total, total.new_tensor(float(stop))]), "mean")
        value = finite_or_raise(told[0], self.step)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), MAX_NORM)
        finite_or_raise(norm, self.step, "gradient")
        self.whole = False
        self.optimizer.step()
        self.losses.append(value)
        self.whole = True
        return bool(told[1] > 0)

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"adapter.{name}": parameter.detach() for name, parameter in self.parameters.items()},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **adam_state(self.optimizer),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """ValueError when it is the state of another adapter."""
        own = {name.removeprefix("adapter."): value for name, value in state.items() if name.startswith("adapter.")}
        self.network.adapter.load(own)
        restore_adam(self.optimizer, state)
        self.losses = state["losses"].tolist()


class Asked:
    """Whether Ctrl+C, or a scheduler, asked the run to stop.

    Asked again after PATIENCE seconds it stops at once, without saving; before, Accelerate's launcher only passes on
    what the terminal has told every process already.
    """

    def __init__(self) -> None:
        self.stop, self._when = False, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[Asked]:
        before = {number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, _frame: object) -> None:
        if self.stop:
            if time.monotonic() - self._when > PATIENCE:
                raise KeyboardInterrupt
            return
        self._when = time.monotonic()
        log.warning("Asked to stop (%s): the update is finished and saved first.", signal.Signals(number).name)
        self.stop = True


class Problems:
    """What could not be read in this process: each told once, and counted."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def add(self, items: list[list[Item]]) -> None:
        for batch in items:
            for item in batch:
                for problem in item.problems:
                    if problem not in self.found:
                        self.found.add(problem)
                        log.warning("Skipped: %s", problem)

    def everywhere(self) -> int:
        """How many there are in all processes."""
        from accelerate.utils import gather_object

        return len(set(gather_object(sorted(self.found))))


def run(
    training: Training,
    found: Iterator[list[list[Item]]],
    steps: int,
    save_every: int,
    save: Callable[[], None],
    told: Callable[[int, float], None],
    problems: Problems,
) -> bool:
    """Train up to `steps` updates, saving on the way and at the end; False when it was asked to stop before.

    told(step, loss) after every update.
    """
    saved = training.step
    with Asked().listening() as asked:
        try:
            for batches in found:
                problems.add(batches)
                stop = training.update(batches, asked.stop)
                if stop or training.step == steps or training.step % save_every == 0:
                    save()
                    saved = training.step
                told(training.step, training.losses[-1])
                if stop:
                    break
        except Exception:  # of the data too: a worker that died, a folder that was unmounted
            if training.whole and training.step > saved:
                save()  # nothing was updated in the one that failed
            raise
    return training.step >= steps


class Progress:
    """Lines for the log: the mean loss since the last one, the speed, and how long it will take."""

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
