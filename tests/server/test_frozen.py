"""Graphs as they were shipped with each release: what people have saved must open and run in all later versions."""

from __future__ import annotations

import contextlib
import json
import os

import pytest

from likeness.toolbox import freeze
from likeness.toolbox.graph import NOTES, Graph, active_nodes, convert, load
from likeness.toolbox.server import PromptError, wait
from likeness.toyworld import workflows

from .. import live, tiny_sana

FOLDER = workflows.ROOT / freeze.FROZEN_GRAPHS
FROZEN = {name: load(FOLDER / f"{name}.json") for name in json.loads((FOLDER / "index.json").read_text())}
FIRST_SAVED = "likeness/subject_00001_.safetensors"  # what the graph names that loads a subject
PLACEHOLDER = "likeness/frozen.safetensors"  # in place of what another graph saves


def wiring(graph: Graph) -> list[tuple[str, list[str]]]:
    """Which nodes a graph has, and what is connected to each."""
    return sorted(
        (node["type"], sorted(entry["name"] for entry in node.get("inputs", []) if entry.get("link") is not None))
        for node in graph["nodes"]
        if node["type"] not in NOTES
    )


OLDER = {  # values of nodes that only older versions of a graph have
    "9 Lab - HiPer - pick the step": {
        **{("After 200 steps", "step"): 2, ("After 400 steps", "step"): 4},
        **{("After 700 steps", "step"): 7, ("After 1000 steps", "step"): 10},
    },
}


def in_server(server, object_info, name: str) -> Graph:
    """A frozen graph with values that the server can take."""
    title = workflows.present(freeze.title(name))
    chosen = workflows.sidecar(title).get("after", {}).get("chosen in")
    more = {tuple(chosen): PLACEHOLDER} if chosen else {}
    if title == "9 Lab - SISO - Sana":
        more |= tiny_sana.in_server(server)
    return workflows.in_small_world(title, object_info, quick=True, more=more, graph=FROZEN[name])


@pytest.fixture
def saved_files(server):
    """Empty files in the place of those that other graphs save."""
    models = server.base / "models"
    paths = [models / "likeness_embeddings" / PLACEHOLDER, models / "loras" / PLACEHOLDER]
    paths += [path for path in [models / "likeness_embeddings" / FIRST_SAVED] if not path.exists()]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    yield
    for path in paths:
        path.unlink()


@pytest.fixture
def busy(server):
    """A queue that waits for an image: what is posted meanwhile is validated by ComfyUI and does not run."""
    pipe = server.base / "input" / "never written.png"
    os.mkfifo(pipe)
    prompt = {
        "image": {"class_type": "LoadImage", "inputs": {"image": pipe.name}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["image", 0]}},
    }
    server.post("/prompt", {"prompt": prompt})
    yield
    assert server.get("/queue")["queue_running"], "the queue became free, and frozen graphs began to run"
    server.post("/queue", {"clear": True})

    def ended() -> bool:
        with contextlib.suppress(OSError):  # it reads at other times
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return not server.get("/queue")["queue_running"]

    wait(ended, 60, "ComfyUI still waits for the image")
    pipe.unlink()


@pytest.mark.usefixtures("saved_files", "busy")
def test_frozen_graphs_open_and_are_valid(server):
    object_info, refused = server.object_info(), {}
    for name, graph in FROZEN.items():
        assert convert(graph, object_info), f"{name}: nothing is left of the graph"
        prompt = convert(in_server(server, object_info, name), object_info)
        try:
            server.queue(prompt)
        except PromptError as error:
            refused[name] = error.sentences()
    assert not refused


@pytest.fixture
def first_saved(results):
    """The first subject as it is trained, so that no empty file takes its name and its number."""
    return results["9 Lab - HiPer - train and edit"]


@pytest.mark.usefixtures("first_saved", "saved_files")
def test_what_no_shipped_graph_does_any_more_still_runs(server, results):
    """A frozen graph that is wired as the present one is not run again: test_graphs runs that."""
    for name, graph in FROZEN.items():
        title = workflows.present(freeze.title(name))
        if title in live.NAMES and wiring(graph) == wiring(workflows.shipped(title)):
            continue
        object_info, more = server.object_info(), {**results.choices(title), **OLDER.get(title, {})}
        lowered = workflows.in_small_world(title, object_info, quick=True, more=more, graph=graph)
        run = server.run(convert(lowered, object_info))
        expected = {str(node["id"]) for node in active_nodes(lowered) if object_info[node["type"]].get("output_node")}
        assert run.status == "execution_success" and expected <= set(run.outputs), f"a part of {name} did not run"
