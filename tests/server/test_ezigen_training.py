"""The shipped graph that trains EZIGen's adapter, in a real server: what it makes, how it is stopped and repeated."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toolbox.server import PromptError
from likeness.toyworld import workflows

from .. import live
from .results import UNWANTED, check_images, distance
from .test_training import equal

NAME, TITLES = "9 Lab - EZIGen - train adapter", ("Prompt alone", "Adapter as it was", "Trained adapter")


class Job:
    """The training of the graph and what saves it, as prompts."""

    def __init__(self, server, object_info) -> None:
        self._server = server
        graph = live.lowered(NAME, object_info)
        self.node, self.saver = (workflows.node_id(graph, title) for title in ("Train", "Save the adapter"))
        self._prompt = with_ancestors(convert(graph, object_info), [self.saver])

    def run(self, on_event=None, **inputs):
        node = {**self._prompt[self.node], "inputs": {**self._prompt[self.node]["inputs"], **inputs}}
        return self._server.run({**self._prompt, self.node: node}, on_event=on_event)

    def saved(self, run) -> dict[str, np.ndarray]:
        name = run.outputs[self.saver]["text"][0].splitlines()[0]
        return load_file(self._server.base / "models" / "likeness_adapters" / name)

    def captions(self) -> list[Path]:
        return sorted((self._server.base / "input" / workflows.TRAINING_SET).glob("*/0.txt"))

    def touch_folder(self) -> None:
        """Make the server execute the training again: a file of its folder is newer now, and the same."""
        os.utime(self.captions()[0])

    def forget_runs(self) -> None:
        for path in (self._server.base / "user" / "likeness").glob("*runs/*.safetensors"):
            path.unlink()


@pytest.fixture
def job(server, object_info) -> Job:
    return Job(server, object_info)


def test_the_graph_trains_and_shows_what_that_changed(results):
    result = results[NAME]
    alone, before, after = (result.pictures(title)[0] for title in TITLES)
    check_images([alone, before])
    assert 1e-4 < distance(before, after) < distance(alone, before), "ten steps change a little"
    report = result.text("Report")
    count = workflows.TRAINING_SUBJECTS
    folder = f"{count} subjects, {count * workflows.TRAINING_PICTURES} captioned images"
    assert folder in report and f"{live.STEPS} steps of 1" in report and "left out" not in report
    assert "113 tensors" not in result.text("Save the adapter") and "50 tensors" in result.text("Save the adapter")
    progress = result.run.of_type("likeness.progress")[-1]
    assert progress["step"] == len(progress["losses"]) == live.STEPS and progress["resumed"] == 0
    assert not [word for word in UNWANTED if word in result.log]


def test_cancelled_it_goes_on_bit_for_bit(server, job):
    """A finished one is served without training, unless a file of the folder has changed."""
    seed, steps, cancel_at = 5001, 4, 2
    asked: list[int] = []
    stopped: list[int] = []

    def cancel(event) -> None:
        state = event["data"].get("nodes", {}).get(job.node) if event["type"] == "progress_state" else None
        if state and state["max"] > 1 and state["value"] >= cancel_at and not asked:
            server.interrupt()
            asked.append(int(state["value"]))

    def stop(event) -> None:
        if event["type"] == "likeness.progress" and not stopped:
            server.interrupt()
            stopped.append(event["data"]["resumed"])

    assert job.run(cancel, seed=seed, steps=steps).status == "execution_interrupted"
    resumed = job.run(seed=seed, steps=steps)
    assert cancel_at <= resumed.of_type("likeness.progress")[-1]["resumed"] <= asked[0] + 1
    job.touch_folder()
    again = job.run(seed=seed, steps=steps)
    assert job.node in again.executed and again.of_type("likeness.progress")[-1]["resumed"] == steps
    caption = job.captions()[0]
    before = caption.read_text()
    try:
        caption.write_text("a photo of something else")
        job.run(stop, seed=seed, steps=steps)
    finally:
        caption.write_text(before)
    assert stopped == [0], "it is trained anew"
    job.forget_runs()
    whole = job.run(seed=seed, steps=steps)
    assert whole.of_type("likeness.progress")[-1]["resumed"] == 0
    assert equal(job.saved(resumed), job.saved(whole)) and equal(job.saved(resumed), job.saved(again))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("../../etc", "not a plain name in ComfyUI's input folder"),
        ("/etc", "not a plain name in ComfyUI's input folder"),
        ("absent", "There is no folder 'absent'"),
        (workflows.PICTURE, "There is no folder"),
    ],
)
def test_other_folders_are_refused(job, folder, message):
    with pytest.raises(PromptError) as refused:
        job.run(folder=folder, seed=5003)
    said = refused.value.sentences()  # newer ComfyUI refuses by itself what is not in the list
    assert (message in said or f"folder: '{folder}' not in" in said) and "Traceback" not in said


def test_a_folder_without_captions_says_which_file_it_misses(server, job):
    folder = workflows.draw_training_set(server.base / "input" / "no_captions", range(2), 2)
    for path in folder.glob("*/*.txt"):
        path.unlink()
    with pytest.raises(PromptError) as refused:
        job.run(folder="no_captions", seed=5004)
    assert "no_captions has no captions" in refused.value.sentences()
    assert "0.txt was expected beside 0.png" in refused.value.sentences()
