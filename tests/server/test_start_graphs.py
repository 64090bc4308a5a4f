"""The graphs for the first ten minutes, and the blueprints in the node library that they are built on."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from likeness.toolbox.graph import convert, load
from likeness.toyworld import workflows

from .. import graph_checks, live
from .results import Result, distance, pixels

STARTS = [name for name in live.NAMES if graph_checks.START.match(name)]
BLUEPRINTS = sorted((workflows.ROOT / "subgraphs").glob("*.json"))


def test_server_lists_the_blueprints(server):
    listed = {entry["name"]: identity for identity, entry in server.get("/global_subgraphs").items()}
    for path in BLUEPRINTS:
        entry = server.get(f"/global_subgraphs/{listed[path.stem]}")
        assert json.loads(entry["data"]) == load(path)
        assert entry["info"]["node_pack"] == f"custom_nodes.{live.PACK}"


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_says_the_same_to_pages_that_keep_its_values_and_to_those_that_do_not(path, object_info):
    """Newer pages take the values of the folded node, older ones those of the nodes inside."""
    graph = load(path)
    assert not list(graph_checks.foreign(graph, object_info))
    older = {**graph, "nodes": [{**graph["nodes"][0], "widgets_values": []}]}
    assert convert(older, object_info) == convert(graph, object_info)


@pytest.mark.parametrize("name", STARTS)
def test_result_of_a_start_graph_is_a_picture_of_its_own(results, server, name):
    result = results[name]
    title = next(node["title"] for node in workflows.shipped(name)["nodes"] if node["type"] == "SaveImage")
    pictures = result.pictures(title)
    source = pixels(Image.open(server.base / "input" / workflows.PICTURE))
    assert pictures and all(picture.std() > 0.03 for picture in pictures)
    same_size = [picture for picture in pictures if picture.shape == source.shape]
    assert all(distance(picture, source) > 0.002 for picture in same_size)


def test_the_subject_is_learned_once_and_the_text_then_only_drawn(results, server, object_info):
    """A new text and another seed: the training comes from the first run."""
    name = STARTS[0]
    before = results[name].pictures("Result")[0]
    texts = {("New picture", "value"): "a photo of a dog at night", ("Draw with the subject", "seed"): 8}
    graph = live.lowered(name, server.object_info(), texts, stock=True)
    result = Result(server, graph, server.run(live.anew(convert(graph, object_info))), "")
    progress = result.run.of_type("likeness.progress")
    assert progress and all(entry["resumed"] == live.STEPS for entry in progress)
    assert distance(result.pictures("Result")[0], before) > 0.002


@pytest.mark.parametrize(
    ("name", "sentence"), [(STARTS[0], "The source prompt is empty"), (STARTS[1], "The training prompt is empty")]
)
def test_page_is_told_of_an_empty_sentence(server, object_info, name, sentence):
    graph = live.lowered(name, object_info, settings={("What the photo shows", "value"): ""})
    run = server.run(live.anew(convert(graph, object_info)))
    assert [event["text"] for event in run.of_type("likeness.warning") if event["text"].startswith(sentence)]


def test_the_sheet_of_methods_ranks_them_and_shows_the_best(results):
    result = results[next(name for name in STARTS if "which method" in name)]
    rows = result.text("Scores").splitlines()[1:5]
    names = ("Text alone", "HiPer", "HiFi Tuner", "SINE")
    assert {name for name in names for row in rows if row.strip().startswith(name)} == set(names)
    assert [row.rstrip().endswith("best") for row in rows] == [True, False, False, False]
    learned = dict(re.findall(r"^(.+): learned in (\d+\.\d) s$", result.text("Scores"), re.MULTILINE))
    assert learned.keys() == set(names[1:]) and all(
        0 < float(seconds) < result.run.seconds for seconds in learned.values()
    )
    (shown,) = result.pictures("Best picture")
    assert shown.shape == (workflows.SIZE, workflows.SIZE, 3)
    assert shown.std() > 0.03
