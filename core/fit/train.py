"""Run a Fit for a number of steps with its state on disk, so that it can be interrupted, resumed and reused."""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .fit import Fit, rises, start_random_numbers
from .runs import RunStore, digest

log = logging.getLogger("likeness")
SAVE_SECONDS = 30.0  # a power cut loses at most this much work; an interrupt loses none
SAVE_SHARE = 10.0  # saving takes at most 1/SAVE_SHARE of the time: a full model's state is slow to write
LOOK = 50  # steps between two looks at whether the loss rises
LOSSES = "fit.losses"

Result = dict[str, Tensor]
"""The result of a run as named tensors on the CPU; a single tensor may be named ''."""


@dataclass
class Run:
    """A stored run: the fit's state after its last update, and the results at the saved steps."""

    state: dict[str, Tensor]
    losses: list[float]
    results: dict[int, Result] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.losses)

    def can_serve(self, steps: int) -> bool:
        """Whether a request for `steps` can be answered without the model."""
        return self.step >= steps and (steps in self.results or self.step in self.results)

    def end_with_warning(self, steps: int) -> int:
        """The step returned for a request for `steps`: that exact step if it was saved, otherwise the last one, with a
        warning when the run is longer.
        """
        end = steps if steps in self.results else self.step
        if end > steps:
            saved = ", ".join(str(step) for step in sorted(self.results) if step < end) or "none"
            log.warning(
                "%d steps were asked for, but this run had gone to step %d and did not keep step %d: you get step %d. "
                "Ask for a step that was kept (%s), or choose another seed to train exactly %d steps.",
                *(steps, end, steps, end, saved, steps),
            )
        return end

    def up_to(self, end: int, every: int) -> dict[int, Result]:
        """The results, by step, that a run ending at this step would have saved."""
        return {s: result for s, result in self.results.items() if s == end or (s < end and s % every == 0)}

    @property
    def last(self) -> Result:
        """The result at the last step."""
        return self.results[self.step]


def stored_run(store: RunStore, key: str, *, whole: bool = True, more: Collection[str] = ()) -> Run | None:
    """The run stored under this key, or None. whole=False is for a run that is not to be continued: it loads only the
    results and the tensors of the fit's state that `more` names.
    """
    required = {LOSSES, *(f"fit.{name}" for name in more)}

    def choose(names: list[str]) -> list[str]:
        return [name for name in names if whole or name in required or name.startswith("kept.")]

    tensors = store.load(key, choose)
    if tensors is None:
        return None
    state = {name[4:]: value for name, value in tensors.items() if name.startswith("fit.")}
    results: dict[int, Result] = {}
    try:
        for name, value in tensors.items():
            if name.startswith("kept."):
                step, _, part = name[5:].partition(".")
                results.setdefault(int(step), {})[part] = value
        return Run(state, tensors[LOSSES].tolist(), results)
    except (KeyError, ValueError):
        log.warning("A stored run is damaged and is trained again.")
        return None


def stored_last(store: RunStore, key: str, steps: int) -> tuple[str, Run | None]:
    """The key and the stored run of a method that saves only its last result: a request for fewer steps than the stored
    run has is a separate run, keyed by its number of steps too.
    """
    run = stored_run(store, key, whole=False)
    if run is not None and (run.step <= steps or steps in run.results):
        return key, run
    shorter_key = digest([key, steps])
    shorter = stored_run(store, shorter_key, whole=False)
    return (key if run is None and shorter is None else shorter_key), shorter


@dataclass(frozen=True)
class Retention:
    """At which steps of a run the result is saved (every `every` steps, and the last), and at most how many."""

    every: int
    most: int | None = None


class Checkpointer:
    """Saves a run while it is trained: its results so far and, periodically, the fit's state."""

    def __init__(self, store: RunStore, key: str, header: dict[str, Any], retention: Retention) -> None:
        self.store, self.key, self.header, self.retention = store, key, header, retention
        self.results: dict[int, Result] = {}
        self._saved_at, self._pause = time.monotonic(), SAVE_SECONDS

    def resume(self, fit: Fit) -> None:
        """Restore the fit to the end of the stored run, if there is one."""
        run = stored_run(self.store, self.key)
        if run is not None:
            self.results = run.results
            fit.restore(run.state)

    def keep(self, step: int, result: Result) -> None:
        """Save the result of a step; drop the oldest beyond the limit."""
        self.results[step] = result
        for old in sorted(self.results)[: 0 if self.retention.most is None else -self.retention.most]:
            del self.results[old]

    def save_if_due(self, fit: Fit) -> None:
        """Store the run if the last save is long enough ago, relative to its cost."""
        if time.monotonic() - self._saved_at > self._pause:
            begin = time.monotonic()
            self.save(fit)
            self._saved_at = time.monotonic()
            self._pause = max(SAVE_SECONDS, SAVE_SHARE * (self._saved_at - begin))

    def save(self, fit: Fit) -> None:
        """Store the run. A full disk must neither stop a healthy run nor mask an interrupt."""
        tensors = {f"fit.{name}": value for name, value in fit.state().items()}
        for step, result in self.results.items():
            tensors |= {f"kept.{step:06d}.{name}".rstrip("."): value for name, value in result.items()}
        try:
            self.store.save(self.key, tensors, self.header)
        except OSError as problem:
            log.warning("The work so far could not be stored (%s).", problem)

    def rescue(self, fit: Fit, result: Callable[[], Result]) -> None:
        """Store an interrupted run. The user must see what interrupted it, not an error raised here."""
        if not fit.step:
            return
        try:
            if fit.step not in self.results and self.retention.most != 1:  # whole weights take too long to write
                self.keep(fit.step, result())
            self.save(fit)
        except Exception as problem:
            log.warning("The work so far could not be kept (%s: %s).", type(problem).__name__, problem)


def train(
    fit: Fit,
    steps: int,
    result: Callable[[], Result],
    checkpointer: Checkpointer,
    on_update: Callable[[Tensor], None],
) -> Run:
    """Run the fit to `steps` updates, or until its `done` is true, resuming from the stored state.

    result() returns the fit's current result; it is also saved where the run stops. on_update receives what each update
    returns; if it raises (an interrupt), the run ends with its work saved.
    """
    checkpointer.resume(fit)
    advice = fit.advice
    try:
        while fit.step < steps and not getattr(fit, "done", False):
            start_random_numbers(fit.step)  # an update does not depend on the one before, whatever the model draws
            preview = fit.update()
            if fit.step % checkpointer.retention.every == 0 or fit.step == steps:
                checkpointer.keep(fit.step, result())
            checkpointer.save_if_due(fit)
            if advice and fit.step % LOOK == 0 and rises(fit.losses):
                log.warning("The loss rises: %s The run goes on; what it saved before stays.", advice)
                advice = ""  # once is enough
            on_update(preview)
    except BaseException:
        checkpointer.rescue(fit, result)
        raise
    if fit.step not in checkpointer.results:
        checkpointer.keep(fit.step, result())
    checkpointer.save(fit)
    return Run({}, list(fit.losses), dict(checkpointer.results))
