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
        "3": {
            "class_type": "Change",
            "inputs": {"gain": 2.0, "blur": 0.5, "image": ["2", 0]},
            "_meta": {"title": "Brighter"},
        },
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


def wired(origin, origin_slot, target, target_slot, identity, kind="IMAGE") -> dict:
    """A link inside a subgraph."""
    return {
        "id": identity,
        "origin_id": origin,
        "origin_slot": origin_slot,
        "target_id": target,
        "target_slot": target_slot,
        "type": kind,
    }


def widget(name: str, kind: str, link: int | None = None) -> dict:
    return {**socket(name, kind, link), "widget": {"name": name}}


def folded(values: list) -> dict:
    """Make -> [Change -> Change] -> Show: the two are inside a subgraph, whose one widget is the gain of both."""
    graph = chain()
    inside = {
        "id": "two",
        "inputs": [{"name": "picture"}, {"name": "strength"}],
        "nodes": [
            {
                "id": index,
                "type": "Change",
                "mode": 0,
                "inputs": [socket("image", "IMAGE", first), socket("mask", "MASK"), widget("gain", "FLOAT", second)],
                "outputs": [output("IMAGE", third)],
                "widgets_values": [1.0, 0.5],
            }
            for index, first, second, third in ((7, 1, 4, 2), (8, 2, 5, 3))
        ],
        "links": [
            wired(-10, 0, 7, 0, 1),
            wired(7, 0, 8, 0, 2),
            wired(8, 0, -20, 0, 3),
            wired(-10, 1, 7, 2, 4, "FLOAT"),
            wired(-10, 1, 8, 2, 5, "FLOAT"),
        ],
    }
    graph["nodes"][2] |= {"type": "two", "widgets_values": values}
    graph["nodes"][2]["inputs"] = [socket("picture", "IMAGE", 1), widget("strength", "FLOAT")]
    return {**graph, "definitions": {"subgraphs": [inside]}}


def inside(graph: dict, definition: int = 0) -> dict:
    return graph["definitions"]["subgraphs"][definition]


def changed(image: list, gain: object) -> dict:
    return {"class_type": "Change", "inputs": {"gain": gain, "blur": 0.5, "image": image}}


def test_a_subgraph_is_converted_as_the_nodes_inside_it():
    graph = folded([3.0])
    kept = copy.deepcopy(graph)
    prompt = convert(graph, INFO)
    assert list(prompt) == ["2", "3:7", "3:8", "4"]
    assert prompt["3:7"] == changed(["2", 0], 3.0) and prompt["3:8"] == changed(["3:7", 0], 3.0)
    assert prompt["4"]["inputs"]["images"] == ["3:8", 0]
    assert graph == kept


def test_values_of_a_subgraph_that_an_older_page_saved_are_those_inside():
    graph = folded([])
    inside(graph)["nodes"][1]["widgets_values"][0] = 4.0
    prompt = convert(graph, INFO)
    assert (prompt["3:7"]["inputs"]["gain"], prompt["3:8"]["inputs"]["gain"]) == (1.0, 4.0)


def test_a_link_into_the_widget_of_a_subgraph_wins():
    graph = folded([3.0])
    graph["nodes"][2]["inputs"][1]["link"] = 9
    graph["links"].append([9, 2, 0, 3, 1, "FLOAT"])
    prompt = convert(graph, INFO)
    assert prompt["3:7"]["inputs"]["gain"] == prompt["3:8"]["inputs"]["gain"] == ["2", 0]


@pytest.mark.parametrize(("mode", "second"), [(BYPASSED, ["2", 0]), (MUTED, None)])
def test_nodes_inside_a_subgraph_that_are_off(mode, second):
    graph = folded([3.0])
    inside(graph)["nodes"][0]["mode"] = mode
    prompt = convert(graph, INFO)
    assert "3:7" not in prompt and prompt["3:8"]["inputs"].get("image") == second


@pytest.mark.parametrize(("mode", "shown"), [(BYPASSED, ["2", 0]), (MUTED, None)])
def test_a_subgraph_that_is_off(mode, shown):
    graph = folded([3.0])
    graph["nodes"][2]["mode"] = mode
    prompt = convert(graph, INFO)
    assert list(prompt) == ["2", "4"] and prompt["4"]["inputs"].get("images") == shown


def test_a_subgraph_inside_a_subgraph():
    graph = folded([3.0])
    outer = copy.deepcopy(inside(graph)) | {"id": "outer"}
    outer["nodes"] = [
        {
            "id": 5,
            "type": "two",
            "mode": 0,
            "inputs": [socket("picture", "IMAGE", 1), widget("strength", "FLOAT", 2)],
            "outputs": [output("IMAGE", 3)],
            "widgets_values": [9.0],
        }
    ]
    outer["links"] = [wired(-10, 0, 5, 0, 1), wired(-10, 1, 5, 1, 2, "FLOAT"), wired(5, 0, -20, 0, 3)]
    graph["definitions"]["subgraphs"].append(outer)
    graph["nodes"][2]["type"] = "outer"
    prompt = convert(graph, INFO)
    assert list(prompt) == ["2", "3:5:7", "3:5:8", "4"]
    assert prompt["3:5:8"] == changed(["3:5:7", 0], 3.0) and prompt["4"]["inputs"]["images"] == ["3:5:8", 0]


def test_subgraphs_that_cannot_be_converted_are_refused():
    with pytest.raises(GraphError, match="but its widgets are"):
        convert(folded([3.0, 4.0]), INFO)
    graph = folded([3.0])
    inside(graph)["nodes"][0] |= {"type": "two", "widgets_values": [1.0]}
    with pytest.raises(GraphError, match="holds itself"):
        convert(graph, INFO)
