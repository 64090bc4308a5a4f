"""Graphs as they were shipped with each release: what people have saved must open and run in all later versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from likeness.toolbox import small_world
from likeness.toolbox.graph import active_nodes, convert, load

from .. import live

RELEASES = Path(__file__).resolve().parents[1] / "data" / "graphs"
FROZEN = sorted(RELEASES.glob("*/*.json"))


def is_shipped(path: Path) -> bool:
    """Whether the graph is still shipped in the very same form; then test_graphs runs it."""
    current = small_world.WORKFLOWS / path.name
    return current.is_file() and current.read_bytes() == path.read_bytes()


def test_this_release_is_frozen():
    """A graph that is shipped must also be kept: copy workflows/*.json to tests/data/graphs/<version>/ at release."""
    newest = max((path.parent for path in FROZEN), key=lambda folder: [int(part) for part in folder.name.split(".")])
    assert {path.stem for path in newest.glob("*.json")} >= set(live.NAMES)


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_frozen_graph_opens_and_runs(server, path):
    object_info = server.object_info()
    graph = load(path)
    assert convert(graph, object_info), "nothing is left of the graph"
    if is_shipped(path):
        return
    lowered = small_world.in_small_world(graph, object_info, live.STEPS, live.SAMPLING_STEPS)
    run = server.run(convert(lowered, object_info))
    assert run.status == "execution_success"
    expected = {str(node["id"]) for node in active_nodes(lowered) if object_info[node["type"]].get("output_node")}
    assert expected <= set(run.outputs), "a part of the graph did not run"
