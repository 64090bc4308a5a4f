"""Runs on disk: stopped, resumed, extended, shortened, served again."""

from __future__ import annotations

import pytest
import torch

from likeness.core.runs import RunStore
from likeness.core.training import stored_run, train

from .test_hiper import make

STEPS, EVERY = 10, 4


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt."""


def go(store: RunStore, steps: int = STEPS, cancel_at: int | None = None):
    fit = make()

    def on_update(_denoised):
        if fit.step == cancel_at:
            raise Cancelled

    run = train(fit, steps, EVERY, lambda: {"": fit.h.detach().clone()[None]}, store, "key", {}, on_update)
    return fit, run


def results(run, steps: int = STEPS):
    end, kept = run.results(steps, EVERY)
    return end, {step: result[""] for step, result in kept.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[step], b[step]) for step in a)


def test_kept_steps_are_every_so_many_and_the_last(tmp_path):
    fit, run = go(RunStore(tmp_path))
    end, kept = results(run)
    assert end == STEPS and sorted(kept) == [4, 8, 10] and torch.equal(kept[10][0], fit.h)


@pytest.mark.parametrize("cancel_at", [1, 4, 7])
def test_cancelled_and_resumed_equals_uninterrupted(tmp_path, cancel_at):
    _, whole = go(RunStore(tmp_path / "whole"))
    store = RunStore(tmp_path / "stopped")
    with pytest.raises(Cancelled):
        go(store, cancel_at=cancel_at)
    assert stored_run(store, "key").step == cancel_at
    fit, resumed = go(store)
    assert same(results(whole)[1], results(resumed)[1]) and whole.losses == resumed.losses
    assert fit.denoiser.calls == STEPS - cancel_at


def test_extended_equals_trained_at_once(tmp_path):
    _, whole = go(RunStore(tmp_path / "whole"), steps=10)
    store = RunStore(tmp_path / "extended")
    go(store, steps=6)
    _, extended = go(store, steps=10)
    assert same(results(whole)[1], results(extended)[1])


def test_fewer_steps_are_answered_from_what_is_there(tmp_path):
    store = RunStore(tmp_path)
    go(store)
    run = stored_run(store, "key")
    end, kept = results(run, steps=8)
    assert end == 8 and sorted(kept) == [4, 8]
    _, direct = go(RunStore(tmp_path / "other"), steps=8)
    assert same(kept, results(direct, 8)[1])


def test_a_step_that_was_not_kept_gives_all_that_was_done(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(Cancelled):
        go(store, cancel_at=7)
    end, kept = results(stored_run(store, "key"), steps=5)
    assert end == 7 and sorted(kept) == [4, 7]
    with pytest.raises(Cancelled):
        go(RunStore(tmp_path / "b"), cancel_at=2)
    end, kept = results(stored_run(RunStore(tmp_path / "b"), "key"), steps=1)
    assert end == 2 and sorted(kept) == [2]
