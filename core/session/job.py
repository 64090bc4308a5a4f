"""One way to run a training: look the run up, serve it, or resume and train it; show it, store it, hand it over.

A method subclasses Job: its Fit (the mathematics), the key of its run, and what is kept of it. run() does the rest.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..fit.fit import Fit
from ..fit.runs import RunStore
from ..fit.train import Checkpointer, Keeping, Result, Run, stored_last, stored_run, train
from .fingerprint import fingerprint
from .progress import Progress
from .session import GuiderDenoiser, Session
from .stores import run_store

LAST = 1 << 62  # save_every of a run whose only result is its last
log = logging.getLogger("likeness")

Opened = contextlib.AbstractContextManager[tuple[Fit, Callable[[], Result]]]


class Job(abc.ABC):
    """One training, described completely: two equal jobs give equal results."""

    method: ClassVar[str]
    """The name of the method, in the log and in the run's header."""
    state: ClassVar[Collection[str]] = ()
    """Names of tensors of the fit's state that the result needs too."""
    shows_image: ClassVar[bool] = False
    """update() returns an image [1, 3, H, W] in 0..1 instead of a denoised latent."""

    if TYPE_CHECKING:  # fields of the method's dataclass, or properties

        @property
        def steps(self) -> int:
            """Updates asked for; the fit may say that it is done before."""

        @property
        def model(self) -> Any:
            """The MODEL, for previews."""

        @property
        def settings(self) -> Any:
            """A dataclass: what decides an update, for the header of the run."""

    @functools.cached_property
    def base(self) -> dict[str, str]:
        """The fingerprint of the MODEL, for the key and for the header of what is made."""
        return fingerprint(self.model)

    @property
    def one_result(self) -> bool:
        """Whether the run keeps its last result only, because it is large."""
        return False

    @property
    def keeping(self) -> Keeping:
        """At which steps a result is kept, and how many of them."""
        return Keeping(LAST, 1 if self.one_result else None)

    @abc.abstractmethod
    def key(self) -> str:
        """The digest of everything that decides the result, except the number of steps."""

    def store(self) -> RunStore:
        """Where the run is kept."""
        return run_store()

    def answered(self, stored: Run) -> bool:
        """Whether a stored run needs no further update."""
        return stored.answers(self.steps)

    def end(self, done: Run) -> int:
        """The step whose result this request gets."""
        return done.told_end(self.steps)

    def begin(self, done: int) -> Job:
        """Called once before the model is loaded, when something is left to do: make what session() and fit() share.

        done: the updates that are stored already.
        """
        return self

    @abc.abstractmethod
    def session(self) -> Session:
        """The session that the fit runs in."""

    @abc.abstractmethod
    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Opened:
        """A context manager inside the session: gives the fit, and a function that returns its present result."""


def run(job: Job, node_id: str | None = None) -> Run:
    """Serve, resume or train; the losses and results up to the step that this request gets.

    Whatever ends a training early (an interrupt, an error) ends it here too, with its work stored.
    """
    key, store = job.key(), job.store()
    if job.one_result:
        key, done = stored_last(store, key, job.steps)
    else:
        done = stored_run(store, key, whole=False, more=job.state)
    progress = Progress(job.model, job.steps, node_id)
    progress.start(0 if done is None else done.step)
    if done is None or not job.answered(done):
        done = _trained(job, 0 if done is None else done.step, store, key, progress)
    end = job.end(done)
    losses = done.losses[:end]
    progress.finish(losses)
    if losses:
        log.info("%s: %d steps, loss %.4f to %.4f", job.method, end, losses[0], losses[-1])
    return Run(done.state, losses, done.up_to(end, job.keeping.every))


def _trained(job: Job, done: int, store: RunStore, key: str, progress: Progress) -> Run:
    finished: list[Run] = []
    if not done:
        log.info("%s: no run is stored for exactly this model, these inputs and settings: it is trained.", job.method)
    job = job.begin(done)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        with job.fit(denoiser, x0) as (fit, result):

            def show(shown: Tensor) -> None:
                if job.shows_image:
                    progress.update(fit.losses, image=shown[0])
                else:
                    progress.update(fit.losses, shown)

            header = {"method": job.method, "settings": asdict(job.settings)}
            trained = train(fit, job.steps, result, Checkpointer(store, key, header, job.keeping), show)
            state = {name: value.cpu() for name, value in fit.state().items() if name in job.state}
            finished.append(Run(state, trained.losses, trained.kept))

    job.session().run(body)
    return finished[0]
