"""Shipped and released graphs, as far as their files alone tell; tests/server looks at the rest."""

from __future__ import annotations

import copy
import hashlib
import json
import re

import pytest

from likeness.toolbox import freeze
from likeness.toyworld import workflows

from .. import graph_checks

KEPT = workflows.ROOT / freeze.FROZEN_GRAPHS
INDEX = json.loads((KEPT / "index.json").read_text(encoding="utf-8"))
NAMES = sorted(path.stem for path in workflows.WORKFLOWS.glob("*.json"))
EDITED = "9 Lab - HiPer - train and edit"
RELEASED = {"0.1.0": 3, "0.2.0": 12, "0.3.0": 18, "0.4.0": 26, "0.5.0": 33}  # graphs of each release


def tried(tmp_path, version: str):
    """A project with the released graphs and one shipped graph."""
    (tmp_path / "workflows").mkdir()
    (tmp_path / freeze.FROZEN_GRAPHS).mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(f'version = "{version}"\n')
    for path in KEPT.iterdir():
        (tmp_path / freeze.FROZEN_GRAPHS / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_shipped_graph_is_in_order(name):
    assert not graph_checks.complaints(name, workflows.shipped(name))


def test_released_graphs_are_all_there_and_unchanged():
    """An edited workflow must not take the place of what people have saved with a release."""
    assert {path.stem for path in KEPT.glob("*.json")} == {*INDEX, "index"}
    for name, entry in INDEX.items():
        assert hashlib.sha256((KEPT / f"{name}.json").read_bytes()).hexdigest() == entry["sha256"], name
    assert len({entry["sha256"] for entry in INDEX.values()}) == len(INDEX), "a graph is kept twice"
    counts = {release: sum(release in entry["releases"] for entry in INDEX.values()) for release in RELEASED}
    assert counts == RELEASED


def test_graphs_of_this_release_are_kept():
    """A version that is raised needs `python toolbox/freeze.py`, which keeps what is shipped with it; graphs that came
    after the last release wait for the next one.
    """
    kept = {freeze.title(name) for name, entry in INDEX.items() if freeze.version() in entry["releases"]}
    new = set(NAMES) - kept
    assert kept and (not new or "## Unreleased" in (workflows.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")), new


def test_freeze_keeps_an_edited_graph_beside_the_released_one(tmp_path):
    root = tried(tmp_path, "9.0.0")
    old = next(name for name, entry in INDEX.items() if name.startswith("sine_edit.") and "0.5.0" in entry["releases"])
    same = (KEPT / f"{old}.json").read_bytes()
    (root / "workflows" / "sine_edit.json").write_bytes(same)
    (root / "workflows" / "sine_faces.json").write_bytes(same + b"\n")
    assert freeze.freeze(root) == ["sine_faces.9.0.0"]
    index = json.loads((root / freeze.FROZEN_GRAPHS / "index.json").read_text())
    assert index[old]["releases"] == [*INDEX[old]["releases"], "9.0.0"]
    assert {name: entry for name, entry in index.items() if name not in (old, "sine_faces.9.0.0")} == {
        name: entry for name, entry in INDEX.items() if name != old
    }
    with pytest.raises(SystemExit, match="kept already"):
        freeze.freeze(root)


def broken(change) -> list[str]:
    graph = copy.deepcopy(workflows.shipped(EDITED))
    change(graph)
    return graph_checks.complaints(EDITED, graph)


def lay_on_another(graph):
    graph["nodes"][1]["pos"] = list(graph["nodes"][2]["pos"])


def rename_what_is_shown(graph):
    next(node for node in graph["nodes"] if node.get("title") == "Edit with the subject")["title"] = "Edit"


def take_the_table_away(graph):
    note = next(node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    note["widgets_values"] = [re.sub(r"(?m)^\|.*$", "", note["widgets_values"][0])]


def held(graph):
    """A group with several nodes, and these."""
    for group in graph["groups"]:
        frame = graph_checks.frame_of(group)
        inside = [node for node in graph["nodes"] if graph_checks.inside(graph_checks.box_of(node), frame)]
        if len(inside) > 1:
            return group, inside
    raise LookupError("no group holds several nodes")


def switch_one_off(graph):
    _, nodes = held(graph)
    nodes[0]["mode"] = 4 if nodes[0].get("mode", 0) == 0 else 0


def cut_one(graph):
    group, nodes = held(graph)
    group["bounding"] = [*group["bounding"][:2], graph_checks.box_of(nodes[0])[2] - group["bounding"][0] - 5, 5000]


def cover_a_title(graph):
    group, nodes = held(graph)
    nodes[0]["pos"] = [nodes[0]["pos"][0], group["bounding"][1] + graph_checks.TITLE_BAR + 5]


def frame_nothing(graph):
    graph["groups"] = [*graph["groups"], {"title": "Empty", "bounding": [-9000, -9000, 10, 10]}]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lay_on_another, "lies on"),
        (rename_what_is_shown, "0 nodes have that title"),
        (take_the_table_away, "No note has a table of models"),
        (frame_nothing, "holds no node"),
        (switch_one_off, "nodes that are on and nodes that are off"),
        (cut_one, "in a group as a whole or not at all"),
        (cover_a_title, "covers the title of the group"),
    ],
)
def test_checks_find_what_is_wrong(change, sentence):
    assert any(sentence in complaint for complaint in broken(change))
