"""What every shipped graph must hold, read from its json alone: made in the page, it is only looked at here.

Each check yields sentences about what is wrong. Nothing depends on the order of the nodes, on their ids, or on how the
page that saved the graph writes numbers and what it adds of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from likeness.toolbox.graph import (
    NOTES,
    Graph,
    GraphError,
    ObjectInfo,
    all_nodes,
    convert,
    flattened,
    label,
    named_values,
    subgraphs,
    widget_slots,
)
from likeness.toyworld import workflows

TITLE_BAR = 30  # pixels above a node's position
GROUP_TITLE = 28  # pixels below a group's upper edge in which the letters of its title stand
MODEL_FILES = (".safetensors", ".ckpt", ".sft", ".gguf", ".bin", ".pt", ".pth")
SAVED = "likeness/"  # where graphs save what others load
PAGE_WORDS = {"Open in MaskEditor", "Set Group Nodes to Always", "Bypass Group Nodes"}  # that a note may quote
NODE_QUOTE = re.compile(r"(?<!\w)'([A-Z](?:[^'\n]|'(?=s ))*)'")
START = re.compile(r"[1-8] Start - ")  # the names of the graphs for the first ten minutes
MOST_NODES, NOTE_WIDTH, TITLE_HEIGHT, GROUP_COLOR = 12, 460, 34, "#3f789e"
SCREEN, FILLED, PADDING = (1600, 1000), 0.75, 10  # how the page fits a graph into its window
READABLE = 8 / 14  # zoom below which the canvas draws no text
BARS = (100, 220)  # of the page's own bars at the left and at the top, in the units of a graph
GROUP_QUOTE = re.compile(r'"([A-Z][^"\n]*)"')

Box = tuple[float, float, float, float]  # left, top, right, bottom


def complaints(name: str, graph: Graph, object_info: ObjectInfo | None = None) -> list[str]:
    """All that is wrong with a shipped graph; without object_info only what can be told without a server."""
    parts = [graph, *subgraphs(graph).values()]
    checks = [check(part) for check in (overlaps, groups) for part in parts]
    checks += [sidecar_titles(name, graph), tables(graph), image(name)]
    checks += [few_nodes(graph), steps(graph), app(graph)] if START.match(name) else []
    if object_info is not None:
        found = list(foreign(graph, object_info))
        if found:
            return found  # the other checks need to know every node
        flat = flattened(graph, object_info)
        checks += [check(flat, object_info) for check in (quoted, unfixed_seeds, unnamed_models)]
        checks += [stale_texts(flat, object_info)] if START.match(name) else []
    return [f"{name}: {sentence}" for check in checks for sentence in check]


def pair(value: Any) -> tuple[float, float]:
    """A position or size, which some pages save as an object."""
    return (value["0"], value["1"]) if isinstance(value, Mapping) else (value[0], value[1])


def box_of(node: Mapping[str, Any]) -> Box:
    """A node with its title bar; of a collapsed node that alone."""
    (left, top), (width, height) = pair(node["pos"]), pair(node["size"])
    below = 0 if (node.get("flags") or {}).get("collapsed") else height
    return left, top - TITLE_BAR, left + width, top + below


def meet(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def inside(inner: Box, outer: Box) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def frame_of(group: Mapping[str, Any]) -> Box:
    left, top, width, height = group["bounding"]
    return left, top, left + width, top + height


def overlaps(graph: Graph) -> Iterator[str]:
    """Nodes must not lie on each other."""
    nodes = graph["nodes"]
    for index, node in enumerate(nodes):
        for other in nodes[:index]:
            if meet(box_of(node), box_of(other)):
                yield f"{label(node)} lies on {label(other)}; move them apart."


def groups(graph: Graph) -> Iterator[str]:
    """A group holds whole nodes, all on or all off, since people switch the group; none of them covers its title.

    Groups must not lie on each other; one group may hold another.
    """
    frames = [(group["title"], frame_of(group)) for group in graph.get("groups") or []]
    for index, (title, frame) in enumerate(frames):
        held = [node for node in graph["nodes"] if inside(box_of(node), frame)]
        cut = [node for node in graph["nodes"] if meet(box_of(node), frame) and node not in held]
        if cut:
            yield f"The group {title} cuts {', '.join(map(label, cut))}; a node is in a group as a whole or not at all."
        if len({node.get("mode", 0) for node in held}) > 1:
            yield f"The group {title} holds nodes that are on and nodes that are off; give all of them the same mode."
        if not held:
            yield f"The group {title} holds no node; remove it."
        for node in held:
            if box_of(node)[1] < frame[1] + GROUP_TITLE:
                yield f"{label(node)} covers the title of the group {title}; move it down."
        for other, place in frames[:index]:
            if meet(frame, place) and not inside(frame, place) and not inside(place, frame):
                yield f"The groups {title} and {other} lie on each other; move them apart."


def few_nodes(graph: Graph) -> Iterator[str]:
    """A start graph is seen at a glance: few nodes, texts that can be read, nothing under the page's bars."""
    boxes = [*map(box_of, graph["nodes"]), *map(frame_of, graph["groups"])]
    sides = [max(box[axis + 2] for box in boxes) - min(box[axis] for box in boxes) + 2 * PADDING for axis in (0, 1)]
    zoom = FILLED * min(screen / side for screen, side in zip(SCREEN, sides, strict=True))
    if zoom < READABLE:
        yield f"It is {sides} large, whose text cannot be read when it is fitted into {SCREEN}: move nodes together."
    if len(graph["nodes"]) > MOST_NODES:
        yield f"It has {len(graph['nodes'])} nodes, expected are {MOST_NODES} at most: fold some into a subgraph."
    for node in graph["nodes"]:
        if node["type"] in NOTES and pair(node["size"])[0] < NOTE_WIDTH:
            yield f"{label(node)} is narrower than {NOTE_WIDTH}; widen it."
    offset = pair(graph["extra"]["ds"]["offset"])
    first = [min(box_of(node)[axis] for node in graph["nodes"]) for axis in (0, 1)]
    if any(place + moved < bar for place, moved, bar in zip(first, offset, BARS, strict=True)):
        yield f"The view is saved at {offset}, where the page's bars cover nodes; expected is {BARS} at least."


def steps(graph: Graph) -> Iterator[str]:
    """A start graph's groups are its steps, counted from 1, whose titles no node covers."""
    numbers = [int(group["title"].split()[0]) for group in graph["groups"] if group["title"][0].isdigit()]
    if sorted(numbers) != list(range(1, len(numbers) + 1)) or not numbers:
        yield f"Its groups are counted {numbers}; count the steps from 1."
    boxes = [(node, box_of(node)) for node in graph["nodes"] if node["type"] not in NOTES]
    for group in graph["groups"]:
        frame = frame_of(group)
        if group["color"] != GROUP_COLOR:
            yield f"The group {group['title']} is {group['color']}, expected is ComfyUI's own {GROUP_COLOR}."
        for node, box in boxes:
            if inside(box, frame) and box[1] < frame[1] + TITLE_HEIGHT:
                yield f"{label(node)} covers the title of the group {group['title']}; move it down."
    for node, box in boxes:
        if not any(inside(box, frame_of(group)) for group in graph["groups"]):
            yield f"{label(node)} is in no group."


def app(graph: Graph) -> Iterator[str]:
    """A start graph can be used as an app: what is asked and shown there exists.

    It opens as a graph: pages of 2025 have an app mode that ignores the choice and lays all nodes on each other.
    """
    if graph["extra"].get("linearMode") is not False:
        yield "It opens as an app, which older pages cannot show; save it from the page's graph view."
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    asked, shown = (graph["extra"].get("linearData", {}).get(key, []) for key in ("inputs", "outputs"))
    if not asked or [nodes[str(identity)]["type"] for identity in shown] != ["SaveImage"]:
        yield "Its app asks nothing, or does not show one saved image; build it in the page's App mode."
    for identity, name in asked:
        entry = {entry["name"]: entry for entry in nodes[str(identity)]["inputs"] if "widget" in entry}.get(name)
        if entry is None or not entry.get("label"):
            yield f"Its app asks for {name} of node {identity}, which is not there or has no label of its own."


def stale_texts(graph: Graph, object_info: ObjectInfo) -> Iterator[str]:
    """A text box into which a link leads shows no other text."""
    for node in graph["nodes"]:
        values = {} if node["type"] in NOTES else named_values(node, object_info)
        for entry in node.get("inputs", []):
            if entry["type"] == "STRING" and entry.get("link") is not None and values.get(entry["name"]):
                yield f"{label(node)} shows {values[entry['name']]!r} in {entry['name']}, but a link leads there."


def notes(graph: Graph) -> str:
    return "\n".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES)


def titles(graph: Graph) -> list[str]:
    return [node["title"] for node in all_nodes(graph) if node.get("title")]


def quoted(graph: Graph, object_info: ObjectInfo) -> Iterator[str]:
    """A note quotes nodes as 'Title' and groups as "Title"; the nodes may stand in another graph that it names."""
    text = notes(graph)
    known = PAGE_WORDS | set(titles(graph)) | {group["title"] for group in graph.get("groups") or []}
    known |= {object_info[node["type"]]["display_name"] for node in graph["nodes"] if node["type"] in object_info}
    for path in workflows.WORKFLOWS.glob("*.json"):
        words = path.stem.rpartition(" - ")[2].capitalize()
        if path.stem in text or (words and words in text):
            known |= {words, *titles(workflows.shipped(path.stem))}
    for kind, pattern in (("node", NODE_QUOTE), ("group", GROUP_QUOTE)):
        for title in sorted(set(pattern.findall(text)) - known):
            yield f"A note quotes '{title}', but no {kind} has that title; change the note or the title."


def sidecar_titles(name: str, graph: Graph) -> Iterator[str]:
    """The nodes that toyworld/graphs names must be there, once where a single one is meant."""
    try:
        values = workflows.sidecar(name)
    except FileNotFoundError:
        yield f"toyworld/graphs/{name}.json is missing; write it as toyworld/graphs/README.md says."
        return
    for node in {**values.get("toyworld", {}), **values.get("quick", {})}:
        if not workflows.has(graph, node):
            yield f"toyworld/graphs/{name}.json sets a value of {node}, but no node has that title or type."
    single = [*values["thumbnail"], *values.get("browser", {}).get("shows", [])]
    single += [values["browser"]["runs"]] if "browser" in values else []
    single += values.get("after", {}).get("chosen in", [])[:1]
    for title in dict.fromkeys(single):
        count = titles(graph).count(title)
        if count != 1:
            yield f"toyworld/graphs/{name}.json names {title}; {count} nodes have that title, expected is one."


def rows(graph: Graph) -> list[list[str]]:
    """The rows of the notes' tables of models: file, folder, licence."""
    lines = [line for line in notes(graph).splitlines() if re.match(r"\| *\[", line)]
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def listed(graph: Graph) -> dict[str, str]:
    """Every file or folder that the tables name, and the folder that it belongs in."""
    return {name: row[1] for row in rows(graph) if len(row) > 1 for name in re.findall(r"\[([^]]+)\]\(", row[0])}


def tables(graph: Graph) -> Iterator[str]:
    """The notes say of every model where it is, where it belongs, and under which licence."""
    if not rows(graph):
        yield "No note has a table of models; list them as | [file](address) | models/folder | licence |."
    for row in rows(graph):
        if len(row) != 3 or not all(row) or not row[1].startswith("models/"):
            yield f"A note's table says {row}; expected is | [file](address) | models/folder | licence |."
    folders = listed(graph)
    for node in graph["nodes"]:
        for model in (node.get("properties") or {}).get("models", []):
            if not model["url"].split("?")[0].endswith(model["name"]):
                yield f"{label(node)}: the address of {model['name']} leads to {model['url']}."
            if folders.get(model["name"]) != f"models/{model['directory']}":
                yield f"{model['name']} in models/{model['directory']} is not listed so in a note's table of models."


def image(name: str) -> Iterator[str]:
    path = workflows.WORKFLOWS / f"{name}.jpg"
    if not path.is_file() or path.read_bytes()[:2] != b"\xff\xd8":
        yield f"{path.name} is missing; python toyworld/thumbnails.py {name} makes it."


def foreign(graph: Graph, object_info: ObjectInfo) -> Iterator[str]:
    """Only nodes of the core and of this pack, in the form that is converted without the page."""
    pack = f"custom_nodes.{next(iter(workflows.NODE_FOLDERS))}"
    for node in all_nodes(graph):
        if node["type"] in NOTES or node["type"] in subgraphs(graph):
            continue
        module = object_info[node["type"]]["python_module"] if node["type"] in object_info else "unknown"
        if module.split(".")[0] not in ("nodes", "comfy_extras") and module != pack:
            yield f"{label(node)} comes from {module}; a shipped graph uses the core and this pack only."
    try:
        convert(graph, object_info)
    except GraphError as error:
        yield str(error)


def unfixed_seeds(graph: Graph, object_info: ObjectInfo) -> Iterator[str]:
    """Everybody who opens a graph should get the same image, and every run serve what is already trained."""
    for node in graph["nodes"]:
        slots = [] if node["type"] in NOTES else widget_slots(node["type"], object_info)
        for slot, value in zip(slots, node.get("widgets_values") or [], strict=False):
            if slot.kind == "control" and value != "fixed":
                yield f"{label(node)}: control after generate of {slot.name} is {value!r}; set it to 'fixed'."


def unnamed_models(graph: Graph, object_info: ObjectInfo) -> Iterator[str]:
    """Every model that a node names stands in a note's table, and the page can offer those of stock loaders."""
    known = listed(graph)
    offered = {model["name"] for node in graph["nodes"] for model in (node.get("properties") or {}).get("models", [])}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        own = node["type"].startswith("Likeness")
        for widget, value in named_values(node, object_info).items():
            model = str(value).endswith(MODEL_FILES) or (node["type"].startswith("LikenessLoad") and widget == "name")
            if not model or str(value).startswith(SAVED):
                continue
            if value not in known:
                yield f"{label(node)} takes {value}, which no note lists with its folder and licence."
            if not own and value not in offered:
                yield f"{label(node)} takes {value}, which is not in its properties.models: no page can offer it."
