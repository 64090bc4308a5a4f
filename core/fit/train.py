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

    def results(self, steps: int, save_every: int) -> tuple[int, dict[int, Result]]:
        """The step reached and all results that a run of this length would have kept, by step."""
        end = self.told_end(steps)
        return end, {
            step: result
            for step, result in self.kept.items()
            if step <= end and (step % save_every == 0 or step == end)
        }


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


def train(
    fit: Fit,
    steps: int,
    save_every: int,
    result: Callable[[], Result],
    store: RunStore,
    key: str,
    header: dict[str, Any],
    on_update: Callable[[Tensor], None],
    keep: int | None = None,
    done: Callable[[], bool] = lambda: False,
) -> Run:
    """Bring the fit to `steps` updates, or until it says that it is done, resuming what is stored under the key.

    result() gives the fit's current result; it is kept at every save_every steps, at the end and where the run stopped,
    of large ones only the last `keep`. on_update gets the denoised estimate of each update; whatever it raises (an
    interrupt) ends the run, with its work saved.
    """
    run = stored_run(store, key) or Run({}, [])
    if run.state:
        fit.restore(run.state)
        run.state = {}
    kept, saved_at, pause = run.kept, time.monotonic(), SAVE_SECONDS

    def save() -> float:
        """Store the run; returns the seconds it took."""
        begin = time.monotonic()
        tensors = {f"fit.{name}": value for name, value in fit.state().items()}
        tensors |= {_kept_name(step, name): value for step, part in kept.items() for name, value in part.items()}
        try:
            store.save(key, tensors, header)
        except OSError as problem:  # a full disk must neither stop a healthy run nor take the place of an interrupt
            log.warning("The work so far could not be stored (%s).", problem)
        return time.monotonic() - begin

    def keep_result() -> None:
        kept[fit.step] = result()
        for old in sorted(kept)[: 0 if keep is None else -keep]:
            del kept[old]

    try:
        while fit.step < steps and not done():
            denoised = fit.update()
            if fit.step % save_every == 0 or fit.step == steps:
                keep_result()
            if time.monotonic() - saved_at > pause:
                pause = max(SAVE_SECONDS, SAVE_SHARE * save())
                saved_at = time.monotonic()
            on_update(denoised)
    except BaseException:
        if fit.step:
            try:
                if fit.step not in kept and keep != 1:  # a single one is a model's whole weights: not worth the wait
                    keep_result()
                save()
            except Exception as problem:  # why the run ended is what the user must see
                log.warning("The work so far could not be kept (%s: %s).", type(problem).__name__, problem)
        raise
    if fit.step not in kept:
        keep_result()
    save()
    return Run({}, list(fit.losses), dict(kept))
