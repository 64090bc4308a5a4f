"""Blueprints and the start graphs that are built on them, as far as their files alone tell."""

from __future__ import annotations

import json
from typing import Any

import pytest

from likeness.toolbox.graph import ENTRY, EXIT, Graph, load, subgraphs
from likeness.toyworld import workflows

from .. import graph_checks

BLUEPRINTS = {path.stem: load(path) for path in (workflows.ROOT / "subgraphs").glob("*.json")}
STARTS = sorted(path.stem for path in workflows.WORKFLOWS.glob("*.json") if graph_checks.START.match(path.stem))
PROMISED = {"IMAGE", "MODEL", "CLIP", "VAE"}  # what goes into each


def meaning(definition: Graph) -> dict[str, Any]:
    """All that a subgraph does, without the ids, which differ where it is placed."""
    names = {node["id"]: node["title"] for node in definition["nodes"]} | {ENTRY: "in", EXIT: "out"}
    assert len(set(names.values())) == len(names), "two nodes have one title"
    ends = ("origin_id", "origin_slot", "target_id", "target_slot")
    links = [[names[link[end]] if end.endswith("id") else link[end] for end in ends] for link in definition["links"]]
    slots = {
        side: [(slot["name"], slot["label"], slot["type"]) for slot in definition[side]]
        for side in ("inputs", "outputs")
    }
    nodes = {node["title"]: (node["type"], node.get("widgets_values")) for node in definition["nodes"]}
    return {"nodes": nodes, "links": sorted(links), **slots}


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint_is_one_node_that_a_newcomer_can_read(name):
    graph = BLUEPRINTS[name]
    (node,), (definition,) = graph["nodes"], subgraphs(graph).values()
    assert not graph["links"] and node["type"] == definition["id"]
    assert name == node["title"] == definition["name"]
    assert definition["description"] == graph["extra"]["BlueprintDescription"]
    assert graph["extra"]["BlueprintSearchAliases"] and definition["category"] == "Likeness"
    assert {entry["type"] for entry in definition["inputs"]} >= PROMISED
    assert definition["outputs"][0]["type"] == "IMAGE"
    assert all(entry["label"] for entry in (*node["inputs"], *node["outputs"]))
    widgets = {entry["label"] for entry in node["inputs"] if "widget" in entry}
    assert "Size" in widgets and len(widgets) <= 9
    assert not list(graph_checks.overlaps(definition))


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_blueprint_file_can_be_read_by_every_server(name):
    """ComfyUI reads blueprints in the system's encoding before 0.4, and no system refuses the file's name."""
    path = workflows.ROOT / "subgraphs" / f"{name}.json"
    assert path.read_text(encoding="utf-8").isascii() and name.isascii()
    assert not set(name) & set('\\/:*?"<>|')


def test_start_graphs_hold_the_blueprints_as_they_are():
    used = set()
    for name in STARTS:
        for definition in subgraphs(workflows.shipped(name)).values():
            assert meaning(definition) == meaning(next(iter(subgraphs(BLUEPRINTS[definition["name"]]).values()))), name
            used.add(definition["name"])
    assert used == set(BLUEPRINTS)


def has_image_of_training(node: dict[str, Any]) -> bool:
    """Whether the node outputs a loss: such a node shows an image while it learns."""
    return "LOSS_MAP" in {output["type"] for output in node.get("outputs") or []}


@pytest.mark.parametrize("name", [*BLUEPRINTS, *STARTS])
def test_folded_node_shows_the_images_of_the_trainings_inside(name):
    """In Vue rendering, by the property that newer pages read."""
    graph = BLUEPRINTS.get(name) or workflows.shipped(name)
    for definition in subgraphs(graph).values():
        (node,) = [node for node in graph["nodes"] if node["type"] == definition["id"]]
        learning = [str(node["id"]) for node in definition["nodes"] if has_image_of_training(node)]
        exposed = node["properties"]["previewExposures"]
        assert [entry["sourceNodeId"] for entry in exposed] == learning
        assert {entry["sourcePreviewName"] for entry in exposed} <= {"$$canvas-image-preview"}
        assert len({entry["name"] for entry in exposed}) == len(exposed)


def test_start_graphs_come_first_and_in_order():
    numbers = [int(name[0]) for name in STARTS]
    assert numbers == list(range(1, len(STARTS) + 1)) and len(STARTS) == 8
    assert sorted(path.stem for path in workflows.WORKFLOWS.glob("*.json"))[: len(STARTS)] == STARTS
    assert all(json.dumps(workflows.shipped(name)["extra"]).count("linearData") == 1 for name in STARTS)


def broken(change) -> list[str]:
    graph = workflows.shipped(STARTS[0])
    change(graph)
    return graph_checks.complaints(STARTS[0], graph)


def titled(graph: Graph, title: str) -> dict[str, Any]:
    return next(entry for entry in (*graph["nodes"], *graph["groups"]) if entry.get("title") == title)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda graph: graph["nodes"].extend(graph["nodes"]), "fold some into a subgraph"),
        (lambda graph: titled(graph, "Note").update(size=[340, 900]), "narrower than 460"),
        (lambda graph: titled(graph, "5 Result").update(bounding=[1560, 0, 500, 1300]), "text cannot be read"),
        (lambda graph: graph["extra"]["ds"].update(offset=[60, 140]), "bars cover nodes"),
        (lambda graph: titled(graph, "2 Your photo").update(title="3 Your photo"), "count the steps"),
        (lambda graph: titled(graph, "1 Model").update(color="#335"), "ComfyUI's own"),
        (lambda graph: titled(graph, "Model")["pos"].__setitem__(1, 50), "covers the title"),
        (lambda graph: graph["groups"].clear(), "is in no group"),
        (lambda graph: graph["extra"].pop("linearData"), "Its app asks nothing"),
        (lambda graph: graph["extra"].update(linearMode=True), "opens as an app"),
        (lambda graph: titled(graph, "Your photo")["inputs"][0].pop("label"), "no label of its own"),
    ],
)
def test_checks_find_what_is_wrong_with_a_start_graph(change, sentence):
    assert any(sentence in complaint for complaint in broken(change))
