"""What the server tells the page about the nodes: names, tooltips, help, translations, templates."""

from __future__ import annotations

import json
import re

import pytest

from likeness.toolbox import compose, small_world, translations
from likeness.toolbox.graph import inputs_of
from likeness.toolbox.shipped import GRAPHS

from .. import live

NODES = (
    "LikenessAlign",
    "LikenessApplyAdapter",
    "LikenessApplyEmbedding",
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
FOLDERS_ALONE = ("siso_sana",)  # its models are folders, which the page cannot look for
MESSAGE_SYNTAX = set("{}@|")  # the page's translator reads these as instructions


def translated(language: str) -> dict:
    return json.loads((small_world.ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def shape(texts: dict) -> dict:
    """Which entries a translation has, without the texts."""
    return {key: shape(value) if isinstance(value, dict) else None for key, value in texts.items()}


def leaves(texts: dict) -> list[str]:
    return [text for value in texts.values() for text in (leaves(value) if isinstance(value, dict) else [value])]


def test_the_list_of_nodes_is_complete(object_info):
    assert tuple(sorted(name for name in object_info if name.startswith(translations.PREFIX))) == NODES


@pytest.mark.parametrize("node", NODES)
def test_node_describes_itself(object_info, node):
    info = object_info[node]
    assert info["python_module"] == f"custom_nodes.{live.PACK}"
    assert info["category"].startswith("likeness/")
    assert info["description"].endswith(".")
    assert info["display_name"] == info["display_name"].title().replace("Lora", "LoRA")
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


def test_english_texts_are_those_of_the_schemas(object_info):
    assert translated("en") == translations.english(object_info), "run python toolbox/translations.py"


def test_chinese_texts_cover_every_node_and_input():
    english, chinese = translated("en"), translated("zh")
    assert shape(chinese) == shape(english)
    for text in leaves(chinese):
        assert text.strip() and not MESSAGE_SYNTAX & set(text)
    tooltips = [entry["tooltip"] for node in chinese.values() for entry in node["inputs"].values()]
    assert all(any(ord(letter) > 0x4E00 for letter in text) for text in tooltips)


def test_server_hands_the_translations_to_the_page(server):
    served = server.get("/i18n")
    for language in ("en", "zh"):
        assert served[language]["nodeDefs"]["LikenessScore"] == translated(language)["LikenessScore"]


def test_every_node_stands_in_a_shipped_graph():
    used = {node["type"] for name in live.NAMES for node in small_world.shipped(name)["nodes"]}
    assert not set(NODES) - used


def test_shipped_graphs_use_core_and_this_pack_only(object_info):
    for name in live.NAMES:
        for node in small_world.shipped(name)["nodes"]:
            if node["type"] != "MarkdownNote":
                module = object_info[node["type"]]["python_module"]
                assert module.split(".")[0] in ("nodes", "comfy_extras") or module == f"custom_nodes.{live.PACK}"


def test_shipped_graphs_are_those_of_their_descriptions(object_info):
    assert tuple(sorted(GRAPHS)) == live.NAMES
    for name in live.NAMES:
        assert compose.compose(name, object_info) == small_world.shipped(name), "run python toolbox/compose.py"


def test_models_are_named_with_folder_and_licence():
    for name in live.NAMES:
        graph = small_world.shipped(name)
        note = next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
        models = [model for node in graph["nodes"] for model in node["properties"].get("models", [])]
        assert models or name in FOLDERS_ALONE
        for model in models:
            assert (
                model["name"] in note
                and f"models/{model['directory']}" in note
                and model["url"].endswith(model["name"])
            )


def test_templates_are_served_with_thumbnails(server):
    assert tuple(sorted(server.get("/api/workflow_templates")[live.PACK])) == live.NAMES
    for name in live.NAMES:
        assert server.get(f"/api/workflow_templates/{live.PACK}/{name}.json") == small_world.shipped(name)
        assert server.get_bytes(f"/api/workflow_templates/{live.PACK}/{name}.jpg")[:2] == b"\xff\xd8"


def test_script_is_served(server):
    scripts = [path for path in server.get("/extensions") if live.PACK in path]
    assert scripts == [f"/extensions/{live.PACK}/js/likeness.js"]
