"""Run a training: return a stored run, or resume and train it, with progress and storage.

A method subclasses Job to define its Fit (the mathematics), the key of its run, and which results are saved; run() does
the rest.
"""

from __future__ import annotations

import abc
import functools
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..fit.fit import Fit, curve, random_numbers
from ..fit.runs import RunStore
from ..fit.train import Checkpointer, Result, Retention, Run, stored_last, stored_run, train
from .fingerprint import fingerprint
from .progress import Progress, Sparingly
from .sampling import objective
from .session import GuiderDenoiser, Session
from .stores import run_store

LAST = 1 << 62  # Retention.every for a run that saves only its last result
_seconds: dict[str, float] = {}  # what each run of this process took, by key
log = logging.getLogger("likeness")

Fitted = tuple[Fit, Callable[[], Result]]


class Job(abc.ABC):
    """The complete description of a training: two equal jobs give equal results."""

    method: ClassVar[str]
    """The name of the method, in the log and in the run's header."""
    state: ClassVar[Collection[str]] = ()
    """Names of the tensors of the fit's state that the result also needs."""
    shows_image: ClassVar[bool] = False
    """update() returns an image [1, 3, H, W] in 0..1 instead of a denoised latent."""

    if TYPE_CHECKING:  # fields of the method's dataclass, or properties

        @property
        def steps(self) -> int:
            """Number of updates requested; the fit may finish earlier."""

        @property
        def model(self) -> Any:
            """The MODEL, for previews."""

        @property
        def settings(self) -> Any:
            """A dataclass of what determines an update, for the header of the run."""

    @functools.cached_property
    def base(self) -> dict[str, str]:
        """The fingerprint of the MODEL, for the run's key and the artifact's header."""
        return fingerprint(self.model)

    @functools.cached_property
    def objective(self) -> dict[str, str]:
        """What a loss on the network's output measures (see sampling.py), for the run's key and the header."""
        return objective(self.model.get_model_object("model_sampling"))

    @property
    def retention(self) -> Retention:
        """At which steps a result is saved, and how many: only the last one where results are large."""
        return Retention(LAST)

    @abc.abstractmethod
    def key(self) -> str:
        """The digest of everything that determines the result, except the number of steps."""

    def store(self) -> RunStore:
        """The store for the run."""
        return run_store()

    def is_complete(self, stored: Run) -> bool:
        """Whether a stored run needs no further updates."""
        return stored.can_serve(self.steps)

    def end(self, done: Run) -> int:
        """The step whose result is returned."""
        return done.end_with_warning(self.steps)

    @abc.abstractmethod
    def session(self) -> Session:
        """The session that the fit runs in; called before the model is loaded, if updates are to be made. What it
        shares with fit() is a cached property.
        """

    @abc.abstractmethod
    def fit(self, denoiser: GuiderDenoiser, x0: Tensor) -> Fitted:
        """Inside the session: the fit, and a function that returns its current result."""

    def so_far(self, denoiser: GuiderDenoiser, fit: Fit, x0: Tensor) -> Tensor | None:
        """An image of what was learned so far, as a latent [1, C, h, w] for the preview. None: the update's own is
        shown. It must not change the fit.
        """
        return None

    def artifact_header(self, settings: dict[str, Any], losses: list[float], **more: Any) -> dict[str, Any]:
        """The header of the artifact that the training makes. more: further entries, or others in place of these."""
        return {"method": self.method, "base": self.base, "settings": settings, "losses": curve(losses), **more}


def run(job: Job) -> Run:
    """Return a stored run, or resume or train it; its losses and results up to the step that is returned.

    An interrupt or error during training is raised here too, after the work so far is stored.
    """
    key, store = job.key(), job.store()
    if job.retention.most == 1:
        key, stored = stored_last(store, key, job.steps)
    else:
        stored = stored_run(store, key, whole=False, more=job.state)
    done, begun = 0 if stored is None else stored.step, time.monotonic()
    progress = Progress(job.model, job.steps, done)
    if stored is None or not job.is_complete(stored):
        _seconds.pop(key, None)
        with random_numbers():  # whether a run is trained or served makes no difference to what follows
            stored = _train(job, done, store, key, progress)
        if not done:
            _seconds[key] = time.monotonic() - begun
    end = job.end(stored)
    losses = stored.losses[:end]
    progress.finish(losses, _seconds.get(key))
    if losses:
        log.info("%s: %d steps, loss %.4f to %.4f", job.method, end, losses[0], losses[-1])
    return Run(stored.state, losses, stored.up_to(end, job.retention.every))


def _train(job: Job, done: int, store: RunStore, key: str, progress: Progress) -> Run:
    if not done:
        log.info("%s: no run is stored for exactly this model, these inputs and settings: it is trained.", job.method)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> Run:
        fit, result = job.fit(denoiser, x0)
        so_far = Sparingly(lambda: job.so_far(denoiser, fit, x0))

        def show(preview: Tensor) -> None:
            if job.shows_image:
                progress.update(fit.losses, image=preview[0])
            elif (image := so_far()) is not None:
                progress.update(fit.losses, image, so_far=True)
            else:
                progress.update(fit.losses, preview)

        header = {"method": job.method, "settings": asdict(job.settings)}
        finished = train(fit, job.steps, result, Checkpointer(store, key, header, job.retention), show)
        state = {name: value.cpu() for name, value in fit.state().items() if name in job.state}
        return Run(state, finished.losses, finished.results)

    return job.session().run(body)
