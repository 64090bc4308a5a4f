"""Graphs as the page saves them: read them, change them, and convert them to the server's prompt format.

convert() does the same as the page's graphToPrompt() for the graphs that this project ships, subgraphs included. It
raises GraphError on anything unknown instead of guessing, such as primitive nodes and %tokens%.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CONTROL_VALUES = ("fixed", "increment", "decrement", "randomize")
NOTES = ("Note", "MarkdownNote")
REROUTE = "Reroute"
PAGE_WIDGETS = ("PreviewAny",)  # all their widgets belong to the page, the server knows none of them
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
UPLOADS = ("image_upload", "video_upload", "audio_upload")
MUTED, BYPASSED = 2, 4
ENTRY, EXIT = -10, -20  # where the links inside a subgraph come from the outside, and lead there
FORMAT_VERSION = 0.4

Graph = dict[str, Any]
ObjectInfo = Mapping[str, Any]


class GraphError(ValueError):
    """The graph contains something that cannot be converted or set faithfully."""


class Slot(NamedTuple):
    """One entry of a node's widgets_values."""

    name: str
    kind: str  # "value", or a widget that the page adds after it: "control", "upload"


class Input(NamedTuple):
    name: str
    type: str
    options: Mapping[str, Any]
    optional: bool


def inputs_of(node_type: str, object_info: ObjectInfo) -> list[Input]:
    """The inputs of a node type in the page's order, from the server's /object_info."""
    if node_type not in object_info:
        raise GraphError(f"The server has no node {node_type}.")
    result = []
    for section in ("required", "optional"):
        for name, spec in (object_info[node_type]["input"].get(section) or {}).items():
            options = spec[1] if len(spec) > 1 else {}
            kind = spec[0]
            if isinstance(kind, list):  # the older format of a list of choices
                kind, options = "COMBO", {**options, "options": kind}
            result.append(Input(name, kind, options, section == "optional"))
    return result


def widget_slots(node_type: str, object_info: ObjectInfo) -> list[Slot]:
    """The meaning of each entry of widgets_values for this node type."""
    slots = []
    for entry in inputs_of(node_type, object_info):
        if entry.type not in WIDGET_TYPES or entry.options.get("forceInput"):
            continue
        slots.append(Slot(entry.name, "value"))
        implicit = entry.type == "INT" and entry.name in ("seed", "noise_seed")
        if entry.options.get("control_after_generate", implicit):
            slots.append(Slot(entry.name, "control"))
        if any(entry.options.get(name) for name in UPLOADS):
            slots.append(Slot(entry.name, "upload"))
    return slots


def label(node: Mapping[str, Any]) -> str:
    return f"Node {node['id']} ({node.get('title') or node['type']})"


def slotted_values(node: Mapping[str, Any], object_info: ObjectInfo) -> dict[Slot, Any]:
    """A node's widget values, with defaults for optional inputs that were appended after the graph was saved."""
    slots, values = widget_slots(node["type"], object_info), node.get("widgets_values") or []
    entries = {entry.name: entry for entry in inputs_of(node["type"], object_info)}
    for slot in slots[len(values) :] if isinstance(values, list) else ():
        entry = entries[slot.name]
        if slot.kind != "value" or not entry.optional or "default" not in entry.options:
            break
        values = [*values, entry.options["default"]]
    if not isinstance(values, list) or len(values) != len(slots):
        names = [f"{slot.name} ({slot.kind})" for slot in slots]
        raise GraphError(f"{label(node)} holds the values {values}, but its widgets are {names}.")
    for slot, value in zip(slots, values, strict=True):
        if slot.kind == "control" and value not in CONTROL_VALUES:
            raise GraphError(f"{label(node)}: behind {slot.name} stands {value!r} instead of one of {CONTROL_VALUES}.")
        if slot.kind == "value" and slot.name == "filename_prefix" and re.search("%[^%]+%", str(value)):
            raise GraphError(f"{label(node)}: the page would replace the token in {value!r}; this converter does not.")
    return dict(zip(slots, values, strict=True))


def named_values(node: Mapping[str, Any], object_info: ObjectInfo) -> dict[str, Any]:
    values = {} if node["type"] in PAGE_WIDGETS else slotted_values(node, object_info)
    return {slot.name: value for slot, value in values.items() if slot.kind == "value"}


def _source(nodes: Mapping[Any, Any], origins: Mapping[Any, Any], link: Any) -> list[Any] | None:
    """[node id, output index] that a link's value really comes from, or None. nodes: by id; origins: of the links."""
    if link is None:
        return None
    if link not in origins:
        raise GraphError(f"Link {link} is used but not defined.")
    identity, index = origins[link]
    if identity is None or nodes[identity].get("mode", 0) == MUTED:  # None: the subgraph gives nothing there
        return None
    node, inputs = nodes[identity], nodes[identity].get("inputs", [])
    if node["type"] == REROUTE:
        return _source(nodes, origins, inputs[0].get("link"))
    if node.get("mode", 0) == BYPASSED:  # its input of the output's type passes, at the same index or else the first
        kind = node["outputs"][index]["type"]
        passed = (entry for entry in inputs[index : index + 1] + inputs if entry["type"] == kind)
        return _source(nodes, origins, next(passed, {}).get("link"))
    return [str(identity), index]


def subgraphs(graph: Graph) -> dict[str, Graph]:
    """The definitions of subgraphs by their id, which is the type of the nodes that stand for them."""
    return {entry["id"]: entry for entry in (graph.get("definitions") or {}).get("subgraphs", [])}


def all_nodes(graph: Graph) -> list[dict[str, Any]]:
    """The nodes of a graph and those inside its subgraphs."""
    return [node for part in (graph, *subgraphs(graph).values()) for node in part["nodes"]]


def flattened(graph: Graph, object_info: ObjectInfo) -> Graph:
    """The graph with each subgraph's inner nodes in its place, also those of subgraphs inside; the ids are the page's
    ("node:inner"), and the values of the node's widgets are those of the inner ones that they stand for.
    """
    flat, definitions = copy.deepcopy(graph), subgraphs(graph)
    flat.pop("definitions", None)
    while host := next((node for node in flat["nodes"] if node["type"] in definitions and not node.get("mode")), None):
        if str(host["id"]).count(":") >= len(definitions):
            raise GraphError(f"{label(host)} is a subgraph that holds itself.")
        _unfold(flat, host, copy.deepcopy(definitions[host["type"]]), definitions, object_info)
    return flat


def _unfold(
    flat: Graph, host: Mapping[str, Any], inside: Graph, definitions: Mapping[str, Graph], info: ObjectInfo
) -> None:
    """Put the nodes and links of a subgraph in the place of the node that stands for it."""
    entries, chosen = {entry["name"]: entry for entry in host.get("inputs", [])}, _own_values(host)
    origins, results = {link[0]: link[1:3] for link in flat["links"]}, {}
    for node in inside["nodes"]:
        for entry in (entry for entry in node.get("inputs", []) if entry.get("link") is not None):
            entry["link"] = f"{host['id']}:{entry['link']}"
    nodes = {node["id"]: node for node in inside["nodes"]}
    for link in inside["links"]:
        source = [f"{host['id']}:{link['origin_id']}", link["origin_slot"]]
        if link["origin_id"] == ENTRY:
            name = inside["inputs"][link["origin_slot"]]["name"]
            source = origins.get(entries.get(name, {}).get("link"))
        if link["target_id"] == EXIT:
            results[link["target_slot"]] = source
        elif source:
            place = [f"{host['id']}:{link['target_id']}", link["target_slot"], link["type"]]
            flat["links"].append([f"{host['id']}:{link['id']}", *source, *place])
        else:  # nothing arrives: the value of the widget counts
            target = nodes[link["target_id"]]
            entry = target["inputs"][link["target_slot"]]
            entry["link"] = None
            if name in chosen and target["type"] in definitions:
                target["widgets_values"] = list({**_own_values(target), entry["name"]: chosen[name]}.values())
            elif name in chosen:
                set_value(target, entry["name"], chosen[name], info)
    for link in [link for link in flat["links"] if link[1] == host["id"]]:
        link[1:3] = results.get(link[2]) or [None, 0]
    for node in inside["nodes"]:
        node["id"] = f"{host['id']}:{node['id']}"
    index = flat["nodes"].index(host)
    flat["nodes"][index : index + 1] = inside["nodes"]


def _own_values(host: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a subgraph's node holds, by input; none where an older page left them to the inner nodes."""
    names = [entry["name"] for entry in host.get("inputs", []) if "widget" in entry]
    values = host.get("widgets_values") or []
    if len(values) not in (0, len(names)):
        raise GraphError(f"{label(host)} holds the values {values}, but its widgets are {names}.")
    return dict(zip(names, values, strict=False))


def active_nodes(graph: Graph) -> Iterator[dict[str, Any]]:
    """The nodes that are sent to the server."""
    for node in graph["nodes"]:
        mode = node.get("mode", 0)
        if mode not in (0, MUTED, BYPASSED):
            raise GraphError(f"{label(node)} has the mode {mode}, which this converter does not know.")
        if mode == 0 and node["type"] not in (*NOTES, REROUTE):
            yield node


def convert(graph: Graph, object_info: ObjectInfo) -> dict[str, Any]:
    """The graph in the format of POST /prompt."""
    graph, prompt = flattened(graph, object_info), {}
    nodes, origins = {node["id"]: node for node in graph["nodes"]}, {link[0]: link[1:3] for link in graph["links"]}
    for node in active_nodes(graph):
        known = {entry.name for entry in inputs_of(node["type"], object_info)}
        inputs = named_values(node, object_info)
        for entry in node.get("inputs", []):
            if entry.get("link") is None:
                continue
            if entry["name"] not in known:
                raise GraphError(f"{label(node)} has no input {entry['name']}.")
            source = _source(nodes, origins, entry["link"])
            if source is not None:
                inputs[entry["name"]] = source
        titled = {"_meta": {"title": node["title"]}} if "title" in node else {}  # as the page does
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, **titled}
    return prompt


def with_ancestors(prompt: Mapping[str, Any], nodes: Iterable[str]) -> dict[str, Any]:
    """The part of a converted graph that these nodes need, themselves included."""
    needed, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node: prompt[node] for node in prompt if node in needed}


def load(path: str | Path) -> Graph:
    graph = json.loads(Path(path).read_text(encoding="utf-8"))
    if graph.get("version") != FORMAT_VERSION:
        raise GraphError(f"{path} has the format version {graph.get('version')}, expected {FORMAT_VERSION}.")
    return graph


def matching_nodes(graph: Graph, name: str) -> list[dict[str, Any]]:
    """The nodes with this title or, if there are none, those of this type; GraphError if there are none either."""
    titled = [node for node in graph["nodes"] if node.get("title") == name]
    nodes = titled or [node for node in graph["nodes"] if node["type"] == name]
    if not nodes:
        raise GraphError(f"The graph has no node titled or of the type {name}.")
    return nodes


def set_value(node: dict[str, Any], entry: str, value: Any, object_info: ObjectInfo) -> None:
    slot = Slot(entry, "value")
    if slot not in widget_slots(node["type"], object_info):
        raise GraphError(f"{label(node)} has no widget {entry}.")
    node["widgets_values"] = list({**slotted_values(node, object_info), slot: value}.values())


def adapt(graph: Graph, settings: Mapping[tuple[str, str], Any], object_info: ObjectInfo) -> Graph:
    """A copy of the graph with changed widget values.

    settings: {(title or type of the node, input): value}. A type selects all its nodes. GraphError for an unknown node
    or input.
    """
    copied = copy.deepcopy(graph)
    for (name, entry), value in settings.items():
        for node in matching_nodes(copied, name):
            set_value(node, entry, value, object_info)
    return copied
