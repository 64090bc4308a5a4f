"""Cancelling, resuming, re-queueing and repeating a training in the real server."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toyworld import workflows

from .. import live

WARM_UP, MEASURED, GROWTH = 5, 50, 0.02


def rows(path) -> dict[str, np.ndarray]:
    found = load_file(path)
    assert found, f"{path} is empty"
    return found


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def trained_steps(run, node: str) -> list[int]:
    """The steps that the progress bar of the node went through."""
    values = []
    for data in run.of_type("progress_state"):
        state = data["nodes"].get(node)
        if state and state["max"] > 1:
            values.append(int(state["value"]))
    return values


def test_cancel_stops_within_a_step_and_the_rest_is_resumed_bit_for_bit(server, training):
    seed, steps, cancel_at = 1001, 14, 5
    after: list[int] = []
    asked: list[float] = []

    def cancel(event) -> None:
        if event["type"] != "progress_state" or training.node not in event["data"]["nodes"]:
            return
        value = event["data"]["nodes"][training.node]["value"]
        if asked:
            after.append(value)
        elif value >= cancel_at:
            server.interrupt()
            asked.append(value)

    cancelled = training.run(cancel, seed=seed, steps=steps)
    assert cancelled.status == "execution_interrupted"
    assert asked and max(after, default=0) <= asked[0] + 1
    assert list(training.runs_folder().glob("*.safetensors")), "nothing was kept of the cancelled run"

    resumed = training.run(seed=seed, steps=steps)
    progress = resumed.of_type("likeness.progress")
    assert cancel_at <= progress[-1]["resumed"] <= asked[0] + 1
    assert progress[-1]["step"] == steps

    training.forget_runs()
    whole = training.run_anew(seed=seed, steps=steps)
    assert whole.of_type("likeness.progress")[-1]["resumed"] == 0
    assert equal(rows(training.saved(resumed)), rows(training.saved(whole)))


def test_a_finished_run_is_served_again_without_training(server, training):
    first = training.run(seed=1002, steps=10)
    again = training.run_anew(seed=1002, steps=10)
    assert training.node in again.executed
    assert again.of_type("likeness.progress")[-1]["resumed"] == 10
    assert equal(rows(training.saved(first)), rows(training.saved(again)))

    fewer = training.run(seed=1002, steps=4, save_every=1)
    assert all(entry["resumed"] >= 4 for entry in fewer.of_type("likeness.progress"))
    assert training.saved(fewer) != training.saved(first)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(server, training):
    files = []
    for seed in (1003, 1003, 1004):
        training.forget_runs()
        files.append(training.saved(training.run_anew(seed=seed, steps=5, save_every=5)))
    first, second, other = (rows(path) for path in files)
    assert equal(first, second)
    assert not equal(first, other)


def test_the_base_model_samples_the_same_before_and_after(server, object_info, training):
    graph = live.lowered("9 Lab - HiPer - train and edit", object_info)
    shown = workflows.node_id(graph, "Edit without the subject")
    sampling = with_ancestors(convert(graph, object_info), [shown])
    pictures = []
    for _ in range(2):  # between the two, the training's prompt drops the sampler's result but keeps the loaded model
        run = server.run(sampling)
        pictures.append(np.asarray(server.images(run, shown)[0]))
        trained = training.run(seed=2000 + len(pictures), steps=3)
        assert training.loader not in trained.executed, "the model was loaded anew: this would prove nothing"
    assert any(sampling[node]["class_type"] == "KSampler" for node in run.executed)
    assert np.array_equal(*pictures)


@pytest.mark.slow
def test_memory_does_not_grow(server, object_info):
    """With networks of SD1.5's width: what is held shows."""
    training, sizes = live.Training(server, object_info, stock=True), []
    for index in range(WARM_UP + MEASURED):
        run = training.run(seed=3000 + index, steps=2, save_every=2)
        assert training.node in run.executed
        sizes.append(server.memory())
    before, after = sizes[WARM_UP - 1], np.median(sizes[-5:])
    assert after < before * (1 + GROWTH), [round(size / 2**20) for size in sizes]


@pytest.mark.parametrize("steps", [2, 3])
def test_progress_events_tell_the_page_what_it_draws(training, steps):
    run = training.run(seed=4000, steps=steps)
    last = run.of_type("likeness.progress")[-1]
    assert last["node"] == training.node
    assert last["steps"] == last["step"] == len(last["losses"]) == steps
    assert last["loss"] == last["losses"][-1] > 0
