"""A method of its own in a few lines: the frame of a training exists once, and gives it all that the others have."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
import torch

from likeness.core.fit.fit import Fit, finite_or_raise
from likeness.core.fit.runs import digest
from likeness.core.session import job as job_module
from likeness.core.session.fingerprint import fingerprint
from likeness.core.session.job import Job, run
from likeness.core.session.session import Session

from .methods import Setting

pytestmark = pytest.mark.usefixtures("own_folders")


class Toy(Fit):
    """Learns one number that is added to the prompt's tokens."""

    def __init__(self, denoiser, x0, rate: float) -> None:
        self.denoiser, self.x0, self.losses = denoiser, x0, []
        self.shift = torch.zeros((), device=x0.device, requires_grad=True)
        self.parameters = {"shift": self.shift}
        self.optimizer = torch.optim.Adam([self.shift], lr=rate)

    def update(self):
        sigma = self.denoiser.sigmas[500].to(self.x0).view(1)
        denoised = self.denoiser.denoised(self.x0, sigma, self.denoiser.context.detach() + self.shift)
        loss = (denoised - self.x0).square().mean()
        self.descend(loss, self.shift)
        self.losses.append(finite_or_raise(loss, self.step))
        return denoised.detach()


@dataclass(frozen=True)
class ToySettings:
    rate: float = 0.05


@dataclass(frozen=True)
class ToyJob(Job):
    method: ClassVar[str] = "toy"
    model: Any
    positive: list
    latent: torch.Tensor
    steps: int
    settings: ToySettings = ToySettings()

    def key(self) -> str:
        return digest([self.method, asdict(self.settings), self.base, self.positive[0][0], self.latent])

    def session(self) -> Session:
        return Session(self.model, self.positive, self.latent)

    def fit(self, denoiser, x0):
        fit = Toy(denoiser, x0, self.settings.rate)
        return fit, lambda: {"shift": fit.shift.detach().cpu().clone().view(1)}


def job(steps: int) -> ToyJob:
    setting = Setting()
    return ToyJob(setting.model, setting.source, setting.latent["samples"], steps)


def learned(steps: int):
    with torch.inference_mode():
        return run(job(steps))


def test_a_method_is_a_fit_and_a_job_of_a_few_lines():
    assert sum(len(inspect.getsource(part).splitlines()) for part in (ToySettings, ToyJob)) < 40
    assert len(inspect.getsource(Toy).splitlines()) < 40


def test_it_is_trained_served_and_continued(monkeypatch, tmp_path):
    whole = learned(5)
    assert whole.step == 5 and whole.losses[-1] < whole.losses[0] and float(whole.last["shift"]) != 0.0
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", None)
        served = learned(5)
    assert served.losses == whole.losses and torch.equal(served.last["shift"], whole.last["shift"])
    assert learned(8).losses[:5] == pytest.approx(whole.losses)


def test_the_key_and_the_fingerprint_are_computed_once(monkeypatch):
    """Both read a model's weights."""
    asked = []
    key = ToyJob.key
    monkeypatch.setattr(ToyJob, "key", lambda self: asked.append("key") or key(self))
    monkeypatch.setattr(job_module, "fingerprint", lambda model: asked.append("fingerprint") or fingerprint(model))
    learned(2)
    assert sorted(asked) == ["fingerprint", "key"]


def test_what_was_cancelled_goes_on_where_it_was(monkeypatch):
    from likeness.core.session.progress import Progress

    class Cancelled(BaseException):
        pass

    def cancel(_self, losses, _denoised=None):
        if len(losses) == 3:
            raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", cancel)
        with pytest.raises(Cancelled):
            learned(6)
    seen = []
    monkeypatch.setattr(Progress, "update", lambda _self, losses, _denoised=None: seen.append(len(losses)))
    assert learned(6).step == 6 and seen == [4, 5, 6]
