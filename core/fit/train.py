"""Running a Fit to a number of steps, with its state on disk: stopped, resumed and served again without training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .fit import Fit
from .runs import RunStore, digest

log = logging.getLogger("likeness")
SAVE_SECONDS = 30.0  # at most this much work is lost to a power cut; an interrupt loses none
SAVE_SHARE = 10.0  # and saving takes at most one part in so many of the time: a model's whole state takes a while
LOSSES = "fit.losses"

Result = dict[str, Tensor]
"""What a run makes, as named tensors on the CPU; a result of one tensor may call it ''."""


@dataclass
class Run:
    """A stored run: the fit's state after its last update, and the result as it was at the kept steps."""

    state: dict[str, Tensor]
    losses: list[float]
    kept: dict[int, Result] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.losses)

    def answers(self, steps: int) -> bool:
        """Whether a request for `steps` can be served without the model."""
        return self.step >= steps and (steps in self.kept or self.step in self.kept)

    def end(self, steps: int) -> int:
        """The step that a request for `steps` gets: this very one if it was kept, else all that was done so far."""
        return steps if steps in self.kept else self.step

    def told_end(self, steps: int) -> int:
        """As end(), with a warning when more was done than is asked for and that very step was not kept."""
        end = self.end(steps)
        if end > steps:
            kept = ", ".join(str(step) for step in sorted(self.kept) if step < end) or "none"
            log.warning(
                "%d steps were asked for, but this run had gone to step %d and did not keep step %d: you get step %d. "
                "Ask for a step that was kept (%s), or choose another seed to train exactly %d steps.",
                *(steps, end, steps, end, kept, steps),
            )
        return end

    def up_to(self, end: int, every: int) -> dict[int, Result]:
        """The results that a run which ended at this step would have kept, by step."""
        return {s: result for s, result in self.kept.items() if s == end or (s < end and s % every == 0)}

    @property
    def last(self) -> Result:
        """The result at the last step."""
        return self.kept[self.step]


def _kept_name(step: int, name: str) -> str:
    return f"kept.{step:06d}" + (f".{name}" if name else "")


def stored_run(store: RunStore, key: str, *, whole: bool = True, more: Collection[str] = ()) -> Run | None:
    """The run kept under this key, or None; its results alone when it is not to be continued (whole=False), and what
    else of the fit's state is asked for.
    """
    chosen = {LOSSES, *(f"fit.{name}" for name in more)}

    def choose(names: list[str]) -> list[str]:
        return [name for name in names if whole or name in chosen or name.startswith("kept.")]

    tensors = store.load(key, choose)
    if tensors is None:
        return None
    state = {name[4:]: value for name, value in tensors.items() if name.startswith("fit.")}
    kept: dict[int, Result] = {}
    for name, value in tensors.items():
        if name.startswith("kept."):
            step, _, part = name[5:].partition(".")
            kept.setdefault(int(step), {})[part] = value
    return Run(state, tensors[LOSSES].tolist(), kept)


def stored_last(store: RunStore, key: str, steps: int) -> tuple[str, Run | None]:
    """A stored run that keeps its last result only, and its name: a request for fewer steps than were done is a run of
    its own, named by its number of steps too.
    """
    run = stored_run(store, key, whole=False)
    if run is not None and (run.step <= steps or steps in run.kept):
        return key, run
    own = digest([key, steps])
    shorter = stored_run(store, own, whole=False)
    if run is None and shorter is None:
        return key, None
    return own, shorter


@dataclass(frozen=True)
class Keeping:
    """At which steps of a run a result is kept (every so many, and the last), and how many of them at most."""

    every: int
    most: int | None = None


class Checkpointer:
    """A run on disk while it is trained: its results so far, and the fit's state often enough."""

    def __init__(self, store: RunStore, key: str, header: dict[str, Any], keeping: Keeping) -> None:
        self.store, self.key, self.header, self.keeping = store, key, header, keeping
        self.kept: dict[int, Result] = {}
        self._saved_at, self._pause = time.monotonic(), SAVE_SECONDS

    def resume(self, fit: Fit) -> None:
        """Bring the fit to where the stored run ended, if there is one."""
        run = stored_run(self.store, self.key)
        if run is None:
            return
        self.kept = run.kept
        if run.state:
            fit.restore(run.state)

    def keep(self, step: int, result: Result) -> None:
        """Keep a result; of large ones the oldest goes."""
        self.kept[step] = result
        for old in sorted(self.kept)[: 0 if self.keeping.most is None else -self.keeping.most]:
            del self.kept[old]

    def save_if_due(self, fit: Fit) -> None:
        """Store the run when that was long ago, for what it costs."""
        if time.monotonic() - self._saved_at > self._pause:
            begin = time.monotonic()
            self.save(fit)
            self._saved_at = time.monotonic()
            self._pause = max(SAVE_SECONDS, SAVE_SHARE * (self._saved_at - begin))

    def save(self, fit: Fit) -> None:
        """Store the run. A full disk must neither stop a healthy run nor take the place of an interrupt."""
        tensors = {f"fit.{name}": value for name, value in fit.state().items()}
        tensors |= {_kept_name(step, name): value for step, part in self.kept.items() for name, value in part.items()}
        try:
            self.store.save(self.key, tensors, self.header)
        except OSError as problem:
            log.warning("The work so far could not be stored (%s).", problem)

    def rescue(self, fit: Fit, result: Callable[[], Result]) -> None:
        """Store what there is of a run that was cut off. Why it was is what the user must see, not a fault in here."""
        if not fit.step:
            return
        try:
            if fit.step not in self.kept and self.keeping.most != 1:  # a model's whole weights are not worth the wait
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
    """Bring the fit to `steps` updates, or until its `done` says so, resuming what is stored.

    result() gives the fit's current result; it is also kept where the run stopped. on_update gets what each update
    returned; whatever it raises (an interrupt) ends the run, with its work saved.
    """
    checkpointer.resume(fit)
    try:
        while fit.step < steps and not getattr(fit, "done", False):
            shown = fit.update()
            if fit.step % checkpointer.keeping.every == 0 or fit.step == steps:
                checkpointer.keep(fit.step, result())
            checkpointer.save_if_due(fit)
            on_update(shown)
    except BaseException:
        checkpointer.rescue(fit, result)
        raise
    if fit.step not in checkpointer.kept:
        checkpointer.keep(fit.step, result())
    checkpointer.save(fit)
    return Run({}, list(fit.losses), dict(checkpointer.kept))
