"""What the server tells the page about the nodes: names, tooltips, help, translations, templates."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import pytest

from likeness.toolbox.graph import inputs_of
from likeness.toyworld import workflows

from .. import graph_checks, live

NODES = (
    "LikenessAlign",
    "LikenessApplyAdapter",
    "LikenessApplyEmbedding",
    "LikenessBestStep",
    "LikenessCaption",
    "LikenessChooseReference",
    "LikenessEncodeSubject",
    "LikenessExtractAdapter",
    "LikenessFineTune",
    "LikenessGuidance",
    "LikenessGuider",
    "LikenessInspect",
    "LikenessInvert",
    "LikenessLoadAdapter",
    "LikenessLoadEmbedding",
    "LikenessLoadRetrieval",
    "LikenessLoadSana",
    "LikenessLoadTuned",
    "LikenessLoadVision",
    "LikenessNullText",
    "LikenessOptimizeLora",
    "LikenessPersonalizationGuidance",
    "LikenessPositionMap",
    "LikenessReferenceGuide",
    "LikenessRefineEmbedding",
    "LikenessRenoise",
    "LikenessReplaceSubject",
    "LikenessSaveEmbedding",
    "LikenessSaveTuned",
    "LikenessScore",
    "LikenessSimilarity",
    "LikenessStagedEdit",
    "LikenessStagedSampler",
    "LikenessSubjectMask",
    "LikenessSubjectModel",
    "LikenessSweep",
    "LikenessSweepPlot",
    "LikenessTrainAdapter",
    "LikenessTrainEmbedding",
)
PREFIX = "Likeness"
FOLDERS_ALONE = ("9 Lab - SISO - Sana",)  # its models are folders, which the page cannot look for
MESSAGE_SYNTAX = set("{}@|")  # the page's translator reads these as instructions


def translated(language: str) -> dict:
    return json.loads((workflows.ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def expected(node: str, object_info: dict) -> dict:
    """Which entries the page looks up for a node; it takes the texts of the schema where a language has none."""
    inputs = {entry.name: {"name": None, "tooltip": None} for entry in inputs_of(node, object_info)}
    outputs = {str(index): {"name": None, "tooltip": None} for index in range(len(object_info[node]["output"]))}
    return {"display_name": None, "description": None, "inputs": inputs, "outputs": outputs}


def shape(texts: dict) -> dict:
    """Which entries a translation has, without the texts."""
    return {key: shape(value) if isinstance(value, dict) else None for key, value in texts.items()}


def leaves(texts: dict) -> list[str]:
    return [text for value in texts.values() for text in (leaves(value) if isinstance(value, dict) else [value])]


def test_the_list_of_nodes_is_complete(object_info):
    assert tuple(sorted(name for name in object_info if name.startswith(PREFIX))) == NODES


@pytest.mark.parametrize("node", NODES)
def test_node_describes_itself(object_info, node):
    info = object_info[node]
    assert info["python_module"] == f"custom_nodes.{live.PACK}"
    assert info["category"].startswith("likeness/")
    assert info["description"].endswith(".")
    name = info["display_name"].partition(" (")[0]  # a method's name is written as its authors do
    assert name == name.title().replace("Lora", "LoRA")
    for entry in inputs_of(node, object_info):
        assert len(entry.options.get("tooltip", "")) > 10, f"{node}.{entry.name} has no tooltip"
        assert entry.name.isascii() and entry.name == entry.name.lower()
        if entry.name == "seed":
            assert entry.options["control_after_generate"] is True
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(len(text or "") > 10 for text in info["output_tooltips"]), f"{node} has an output without tooltip"


@pytest.mark.parametrize("node", NODES)
def test_help_page_names_every_input_and_output(server, object_info, node):
    page = server.get_bytes(f"/extensions/{live.PACK}/docs/{node}.md").decode()
    names = [entry.name for entry in inputs_of(node, object_info)] + object_info[node]["output_name"]
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", page)]


def test_chinese_texts_cover_every_node_and_input(object_info):
    chinese = translated("zh")
    assert shape(chinese) == {node: expected(node, object_info) for node in NODES}
    for text in leaves(chinese):
        assert text.strip() and not MESSAGE_SYNTAX & set(text)
    tooltips = [entry["tooltip"] for node in chinese.values() for entry in node["inputs"].values()]
    assert all(any(ord(letter) > 0x4E00 for letter in text) for text in tooltips)


def test_server_hands_the_translations_to_the_page(server):
    assert server.get("/i18n")["zh"]["nodeDefs"]["LikenessScore"] == translated("zh")["LikenessScore"]


def test_every_node_stands_in_a_shipped_graph():
    used = {node["type"] for name in live.NAMES for node in workflows.shipped(name)["nodes"]}
    assert not set(NODES) - used


@pytest.mark.parametrize("name", live.NAMES)
def test_shipped_graph_holds_what_people_rely_on(object_info, name):
    graph = workflows.shipped(name)
    assert not graph_checks.complaints(name, graph, object_info)
    assert name in FOLDERS_ALONE or any((node.get("properties") or {}).get("models") for node in graph["nodes"])


def test_templates_are_served_with_thumbnails(server):
    assert tuple(sorted(server.get("/api/workflow_templates")[live.PACK])) == live.NAMES
    for name in live.NAMES:
        address = f"/api/workflow_templates/{live.PACK}/{quote(name)}"
        assert server.get(f"{address}.json") == workflows.shipped(name)
        assert server.get_bytes(f"{address}.jpg")[:2] == b"\xff\xd8"


def test_script_is_served(server):
    scripts = [path for path in server.get("/extensions") if live.PACK in path]
    assert scripts == [f"/extensions/{live.PACK}/js/likeness.js"]
