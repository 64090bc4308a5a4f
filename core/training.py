"""Running a Fit to a number of steps, with its state on disk: stopped, resumed and served again without training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .fitting import Fit
from .runs import RunStore

log = logging.getLogger("likeness")
SAVE_SECONDS = 30.0  # at most this much work is lost to a power cut; an interrupt loses none


@dataclass
class Run:
    """A stored run: the fit's state after its last update, and the result as it was at the kept steps."""

    state: dict[str, Tensor]
    losses: list[float]
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return len(self.losses)

    def results(self, steps: int, save_every: int, last: Tensor) -> tuple[int, dict[int, Tensor]]:
        """What a request for `steps` gets: the step reached and the results by step.

        A run that went further and kept this very step answers as if it had stopped there. If it did not keep it, all
        that was done so far is handed out, with `last` as its newest result.
        """
        end = steps if steps in self.kept else self.step
        chosen = {
            step: rows for step, rows in self.kept.items() if step <= end and (step % save_every == 0 or step == end)
        }
        return end, chosen if end in chosen else {**chosen, end: last}


def stored_run(store: RunStore, key: str) -> Run | None:
    """The run kept under this key, or None."""
    tensors = store.load(key)
    if tensors is None:
        return None
    state = {name[4:]: value for name, value in tensors.items() if name.startswith("fit.")}
    kept = {int(name[5:]): value for name, value in tensors.items() if name.startswith("kept.")}
    return Run(state, state["losses"].tolist(), kept)


def _try(save: Callable[[], Run]) -> None:
    """Save; a full disk must neither stop a healthy run nor take the place of an interrupt."""
    try:
        save()
    except OSError as problem:
        log.warning("The work so far could not be stored (%s).", problem)


def train(
    fit: Fit,
    steps: int,
    save_every: int,
    result: Callable[[], Tensor],
    store: RunStore,
    key: str,
    header: dict[str, Any],
    on_update: Callable[[Tensor], None],
) -> Run:
    """Bring the fit to `steps` updates, resuming what is stored under the key.

    result() gives the fit's current result as a tensor on the CPU; it is kept at every save_every steps and at the end.
    on_update gets the denoised estimate of each update; whatever it raises (an interrupt) ends the run, with its work
    saved.
    """
    run = stored_run(store, key) or Run({}, [])
    if run.state:
        fit.restore(run.state)
    kept, saved_at = run.kept, time.monotonic()

    def save() -> Run:
        state = fit.state()
        tensors = {f"fit.{name}": value for name, value in state.items()}
        tensors |= {f"kept.{step:06d}": value for step, value in kept.items()}
        store.save(key, tensors, header)
        return Run(state, list(fit.losses), dict(kept))

    try:
        while fit.step < steps:
            denoised = fit.update()
            if fit.step % save_every == 0 or fit.step == steps:
                kept[fit.step] = result()
            if time.monotonic() - saved_at > SAVE_SECONDS:
                _try(save)
                saved_at = time.monotonic()
            on_update(denoised)
    except BaseException:
        if fit.step:
            _try(save)
        raise
    return save()
