"""The graph tools: converting for the server, and setting values, on small graphs made by hand."""

from __future__ import annotations

import copy

import pytest

from likeness.toolbox.graph import BYPASSED, MUTED, GraphError, adapt, convert, named_values, with_ancestors

INFO = {
    "Make": {
        "input": {
            "required": {
                "text": ["STRING", {"default": "hello"}],
                "seed": ["INT", {"default": 3}],
                "mode": [["fast", "slow"], {}],
                "size": ["COMBO", {"options": ["s", "l"], "default": "l"}],
            }
        },
        "output": ["IMAGE"],
        "output_name": ["IMAGE"],
    },
    "Change": {
        "input": {
            "required": {"image": ["IMAGE"], "gain": ["FLOAT", {"default": 1.0}]},
            "optional": {"mask": ["MASK"], "blur": ["FLOAT", {"default": 0.5}]},
        },
        "output": ["IMAGE"],
        "output_name": ["IMAGE"],
    },
    "Show": {
        "input": {"required": {"images": ["IMAGE"], "title": ["STRING", {"default": ""}]}},
        "output": [],
        "output_name": [],
    },
}


def socket(name: str, kind: str, link: int | None = None) -> dict:
    return {"name": name, "type": kind, "link": link}


def output(kind: str, *links: int) -> dict:
    return {"name": kind, "type": kind, "links": list(links)}


def chain() -> dict:
    """Make -> Change -> Show, as the page saves it; a widget's own socket appears only where it is connected."""
    return {
        "nodes": [
            {"id": 1, "type": "MarkdownNote", "mode": 0, "widgets_values": ["# What it does"]},
            {
                "id": 2,
                "type": "Make",
                "mode": 0,
                "outputs": [output("IMAGE", 1)],
                "widgets_values": ["a cat", 3, "fixed", "fast", "l"],
            },
            {
                "id": 3,
                "type": "Change",
                "title": "Brighter",
                "mode": 0,
                "inputs": [socket("image", "IMAGE", 1), socket("mask", "MASK")],
                "outputs": [output("IMAGE", 2)],
                "widgets_values": [2.0, 0.5],
            },
            {"id": 4, "type": "Show", "mode": 0, "inputs": [socket("images", "IMAGE", 2)], "widgets_values": [""]},
        ],
        "links": [[1, 2, 0, 3, 0, "IMAGE"], [2, 3, 0, 4, 0, "IMAGE"]],
        "version": 0.4,
    }


def test_conversion_of_values_and_links():
    assert convert(chain(), INFO) == {
        "2": {"class_type": "Make", "inputs": {"text": "a cat", "seed": 3, "mode": "fast", "size": "l"}},
        "3": {"class_type": "Change", "inputs": {"gain": 2.0, "blur": 0.5, "image": ["2", 0]}},
        "4": {"class_type": "Show", "inputs": {"title": "", "images": ["3", 0]}},
    }


def test_the_control_behind_a_seed_is_not_a_value():
    graph = chain()
    assert graph["nodes"][1]["widgets_values"] == ["a cat", 3, "fixed", "fast", "l"]
    assert named_values(graph["nodes"][1], INFO)["mode"] == "fast"


def test_bypassed_node_hands_its_input_on_and_muted_node_nothing():
    graph = chain()
    graph["nodes"][2]["mode"] = BYPASSED
    prompt = convert(graph, INFO)
    assert "3" not in prompt and prompt["4"]["inputs"]["images"] == ["2", 0]
    graph["nodes"][2]["mode"] = MUTED
    assert "images" not in convert(graph, INFO)["4"]["inputs"]


def test_reroute_is_followed():
    graph = chain()
    last = graph["nodes"][3]["inputs"][0]
    graph["nodes"].append({"id": 9, "type": "Reroute", "inputs": [{"link": last["link"]}], "outputs": [{}]})
    graph["links"].append([50, 9, 0, 4, 0, "IMAGE"])
    last["link"] = 50
    assert convert(graph, INFO)["4"]["inputs"]["images"] == ["3", 0]


def broken(change) -> dict:
    graph = copy.deepcopy(chain())
    change(graph)
    return graph


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda graph: graph["nodes"][1]["widgets_values"].pop(), "but its widgets are"),
        (lambda graph: graph["nodes"][1]["widgets_values"].__setitem__(2, "fast"), "behind seed stands"),
        (lambda graph: graph["nodes"][1].__setitem__("type", "Unknown"), "no node Unknown"),
        (lambda graph: graph["nodes"][1].__setitem__("mode", 7), "mode 7"),
        (lambda graph: graph["nodes"][3]["inputs"][0].__setitem__("link", 99), "Link 99"),
        (lambda graph: graph["nodes"][3]["inputs"][0].__setitem__("name", "other"), "no input other"),
        (lambda graph: graph.__setitem__("definitions", {"subgraphs": [{}]}), "subgraphs"),
    ],
)
def test_what_is_not_known_is_refused(change, expected):
    with pytest.raises(GraphError, match=expected):
        convert(broken(change), INFO)


def test_adapt_changes_a_copy_by_title_or_type():
    graph = chain()
    changed = adapt(graph, {("Brighter", "gain"): 3.0, ("Make", "mode"): "slow"}, INFO)
    assert convert(changed, INFO)["3"]["inputs"]["gain"] == 3.0
    assert convert(changed, INFO)["2"]["inputs"] == {"text": "a cat", "seed": 3, "mode": "slow", "size": "l"}
    assert graph == chain()
    for setting in (("Darker", "gain"), ("Brighter", "image"), ("Brighter", "none")):
        with pytest.raises(GraphError):
            adapt(graph, {setting: 1}, INFO)


def test_a_graph_saved_before_an_optional_input_was_added():
    graph = chain()
    assert graph["nodes"][2]["widgets_values"].pop() == 0.5
    assert convert(graph, INFO)["3"]["inputs"]["blur"] == 0.5
    changed = adapt(graph, {("Brighter", "blur"): 0.7}, INFO)
    assert changed["nodes"][2]["widgets_values"] == [2.0, 0.7]
    graph["nodes"][2]["widgets_values"].clear()
    with pytest.raises(GraphError, match="but its widgets are"):
        convert(graph, INFO)


def test_ancestors():
    prompt = convert(chain(), INFO)
    assert set(with_ancestors(prompt, ["3"])) == {"2", "3"}
