"""Runs on disk: stopped, resumed, extended, shortened, served again."""

from __future__ import annotations

import pytest
import torch

from likeness.core.fit import train as training
from likeness.core.fit.fit import adam_state, in_groups
from likeness.core.fit.runs import RunStore
from likeness.core.fit.train import Checkpointer, Retention, stored_run, train

from .test_hiper import make

STEPS, EVERY = 10, 4


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt."""


def go(store: RunStore, steps: int = STEPS, cancel_at: int | None = None):
    fit = make()

    def on_update(_denoised):
        if fit.step == cancel_at:
            raise Cancelled

    checkpointer = Checkpointer(store, "key", {}, Retention(EVERY))
    run = train(fit, steps, lambda: {"": fit.h.detach().clone()[None]}, checkpointer, on_update)
    return fit, run


def results(run, steps: int = STEPS):
    end = run.end_with_warning(steps)
    kept = run.up_to(end, EVERY)
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


class Slow(RunStore):
    """A store on a clock of its own, where saving takes 20 seconds."""

    now = 0.0

    def save(self, key, tensors, header):
        self.saves.append(self.now)
        self.now += 20.0
        super().save(key, tensors, header)


def test_saving_takes_at_most_a_tenth_of_the_time(tmp_path, monkeypatch):
    store = Slow(tmp_path)
    store.saves = []
    monkeypatch.setattr(training.time, "monotonic", lambda: store.now)
    fit = make()

    def on_update(_denoised):
        store.now += 10.0

    train(fit, 60, lambda: {"": fit.h.detach().clone()}, Checkpointer(store, "key", {}, Retention(100)), on_update)
    assert store.saves[0] == 40.0, "the first after half a minute"
    pauses = [after - before - 20.0 for before, after in zip(store.saves, store.saves[1:-1], strict=False)]
    assert pauses and all(pause >= 200.0 for pause in pauses)


def test_a_full_disk_does_not_cost_the_result(tmp_path, monkeypatch, caplog):
    def full(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(RunStore, "save", full)
    fit, run = go(RunStore(tmp_path))
    assert run.step == STEPS and torch.equal(run.results[STEPS][""][0], fit.h.detach())
    assert "could not be stored (disk full)" in caplog.text


def test_results_alone_are_read_when_nothing_is_to_be_continued(tmp_path):
    store = RunStore(tmp_path)
    go(store)
    run = stored_run(store, "key", whole=False)
    assert run.state.keys() == {"losses"} and sorted(run.results) == [4, 8, 10] and run.can_serve(STEPS)


def test_runs_of_the_first_release_are_still_served(tmp_path):
    """They kept one nameless tensor for each step, and not the last one when they were cancelled."""
    store = RunStore(tmp_path)
    fit, _ = go(store, steps=6)
    tensors = store.load("key")
    del tensors["kept.000006"]
    store.save("key", tensors, {})
    old = stored_run(store, "key")
    assert sorted(old.results) == [4] and old.results[4].keys() == {""} and not old.can_serve(5)
    again, run = go(store, steps=5)
    assert run.step == 6 and torch.equal(run.results[6][""][0], fit.h.detach()) and again.denoiser.calls == 0


def test_weights_in_groups_are_updated_to_the_very_bits_of_torchs_own_loop(monkeypatch):
    """And so are their moments, under the same numbers."""
    monkeypatch.setattr("likeness.core.fit.fit.GROUP", 4 * 100)
    shapes = [(3,), (5, 7), (64,), (20, 10), (1,), (2, 2)]

    def trained(make) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = make(leaves)
        for _ in range(3):
            for leaf in leaves:
                leaf.grad = torch.randn(leaf.shape, generator=generator)
            optimizer.step()
        return leaves, adam_state(optimizer)

    leaves, state = trained(lambda leaves: torch.optim.AdamW(in_groups(leaves), lr=1e-2, foreach=True))
    loop, moments = trained(lambda leaves: torch.optim.AdamW(leaves, lr=1e-2, foreach=False))
    assert all(torch.equal(a, b) for a, b in zip(leaves, loop, strict=True))
    assert state.keys() == moments.keys() and all(torch.equal(state[name], moments[name]) for name in state)
    assert [len(group["params"]) for group in in_groups(leaves)] == [2, 1, 1, 2]
