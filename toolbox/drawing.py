"""Draws graphs in the page's own format from short descriptions, laid out in columns."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .graph import BYPASSED, FORMAT_VERSION, Graph, GraphError, Input, ObjectInfo, inputs_of

WIDTH, GAP_X, GAP_Y = 340, 70, 60
TITLE, SLOT, WIDGET, TEXT_BOX, PICTURE, CURVE = 40, 22, 26, 110, 260, 130
TEXT_NODES = ("PrimitiveString", "PrimitiveStringMultiline")
PICTURE_NODES = ("LoadImage", "PreviewImage", "SaveImage")
NAMESPACE = uuid.UUID("6c6f5f0e-0c9a-4b0e-9a43-2f6f8a1c7e11")
OPTIONAL_SHAPE = 7  # how the page draws an input that need not be connected


@dataclass(frozen=True)
class Output:
    """An output of a drawn node, to be given as the input of another."""

    node: int
    index: int


@dataclass(frozen=True)
class Node:
    """A drawn node. node["IMAGE"] is its output of that name."""

    id: int
    type: str
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Output:
        if name not in self.names:
            raise GraphError(f"{self.type} has no output {name}, only {', '.join(self.names)}.")
        return Output(self.id, self.names.index(name))


class Drawing:
    """Collects nodes column by column; graph() gives what the page loads."""

    def __init__(self, name: str, object_info: ObjectInfo) -> None:
        self._name, self._info = name, object_info
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._x, self._y = 0, 0

    def column(self) -> None:
        """Go on in a new column to the right."""
        if self._nodes:
            self._x += WIDTH + GAP_X
        self._y = 0

    def note(self, text: str, height: int) -> None:
        """A note in Markdown."""
        self._place(
            {"type": "MarkdownNote", "inputs": [], "outputs": [], "widgets_values": [text], "title": "Note"}, height
        )
        self._nodes[-1] |= {"color": "#432", "bgcolor": "#653"}

    def node(
        self, node_type: str, title: str = "", models: tuple[Mapping[str, str], ...] = (), extra: int = 0, **values: Any
    ) -> Node:
        """A node with its inputs by name: an Output connects, anything else is a widget's value.

        Widgets that are not named keep their defaults; the control behind a seed is 'fixed'. extra: height for what the
        node shows below its widgets.
        """
        entries, identity = inputs_of(node_type, self._info), len(self._nodes) + 1
        unknown = set(values) - {entry.name for entry in entries}
        if unknown:
            raise GraphError(f"{node_type} has no input {', '.join(sorted(unknown))}.")
        slots = [
            self._slot(entry, values.get(entry.name), identity, index)
            for index, entry in enumerate(sorted_slots(entries))
        ]
        info = self._info[node_type]
        names = tuple(info["output_name"])
        record: dict[str, Any] = {
            "type": node_type,
            "inputs": slots,
            "outputs": [
                {"name": name, "type": kind, "links": []} for name, kind in zip(names, info["output"], strict=True)
            ],
            "properties": {
                "Node name for S&R": node_type,
                **({"models": [dict(model) for model in models]} if models else {}),
            },
            "widgets_values": [value for entry in entries for value in widget_values(entry, self._shown(values))],
        }
        if title:
            record["title"] = title
        self._place(record, extra + height_of(node_type, entries, len(names)))
        return Node(identity, node_type, names)

    def group(self, title: str, nodes: list[Node], color: str = "#3f789e", bypassed: bool = False) -> None:
        """A titled frame around nodes, which may be shipped switched off."""
        records = [record for record in self._nodes if record["id"] in {node.id for node in nodes}]
        for record in records:
            record["mode"] = BYPASSED if bypassed else 0
        boxes = [(*record["pos"], *record["size"]) for record in records]
        left, top = min(box[0] for box in boxes) - 15, min(box[1] for box in boxes) - 75
        right, bottom = max(box[0] + box[2] for box in boxes) + 15, max(box[1] + box[3] for box in boxes) + 15
        bounding = [left, top, right - left, bottom - top]
        self._groups.append(
            {"id": len(self._groups) + 1, "title": title, "bounding": bounding, "color": color, "flags": {}}
        )

    def graph(self) -> Graph:
        """The finished graph, equal for equal descriptions."""
        return {
            "id": str(uuid.uuid5(NAMESPACE, self._name)),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 140]}},
            "version": FORMAT_VERSION,
        }

    def _shown(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with a connected text in place of its connection: what a greyed-out widget shows."""
        found = dict(values)
        for name, value in values.items():
            source = self._nodes[value.node - 1] if isinstance(value, Output) else None
            if source is not None and source["type"] in TEXT_NODES:
                found[name] = source["widgets_values"][0]
        return found

    def _slot(self, entry: Input, value: Any, identity: int, index: int) -> dict[str, Any]:
        slot: dict[str, Any] = {"name": entry.name, "type": entry.type, "link": None}
        if entry.optional:
            slot["shape"] = OPTIONAL_SHAPE
        if entry.is_widget:
            slot["widget"] = {"name": entry.name}
        if isinstance(value, Output):
            source = self._nodes[value.node - 1]["outputs"][value.index]
            slot["link"] = len(self._links) + 1
            source["links"].append(slot["link"])
            self._links.append([slot["link"], value.node, value.index, identity, index, source["type"]])
        elif value is not None and not entry.is_widget:
            raise GraphError(f"The input {entry.name} takes a connection, not {value!r}.")
        return slot

    def _place(self, record: dict[str, Any], height: int) -> None:
        identity = len(self._nodes) + 1
        frame = {"id": identity, "type": record.pop("type"), "pos": [self._x, self._y], "size": [WIDTH, height]}
        self._nodes.append({**frame, "flags": {}, "order": identity - 1, "mode": 0, "properties": {}, **record})
        self._y += height + GAP_Y


def sorted_slots(entries: list[Input]) -> list[Input]:
    """The page lists sockets first, then the inputs that also have a widget."""
    return sorted(entries, key=lambda entry: entry.is_widget)


def widget_values(entry: Input, values: Mapping[str, Any]) -> list[Any]:
    """What the page saves for one input: nothing for sockets, for widgets a value and what stands behind it."""
    if not entry.is_widget:
        return []
    value = values.get(entry.name)
    if value is None or isinstance(value, Output):
        value = entry.options.get("default", entry.choices[0] if entry.choices else "")
    behind = ["fixed"] if entry.has_control else []
    return [value, *behind, *(["image"] if entry.options.get("image_upload") else [])]


def height_of(node_type: str, entries: list[Input], outputs: int) -> int:
    """Room for a node: its title, sockets, widgets, and a picture where it shows one."""
    widgets = [entry for entry in entries if entry.is_widget]
    boxes = sum(bool(entry.options.get("multiline")) for entry in widgets)
    rows = len(widgets) - boxes + sum(entry.has_control for entry in widgets)
    height = TITLE + SLOT * max(len(entries) - len(widgets), outputs) + WIDGET * rows + TEXT_BOX * boxes
    return height + (PICTURE if node_type in PICTURE_NODES else 0)
