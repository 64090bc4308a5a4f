"""The small world's own mask nodes, put into shipped graphs where the subject alone is to be looked at."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..toolbox.graph import Graph, GraphError

PLAYER = "ToyworldSubjectMask"


def with_subject_masks(graph: Graph) -> Graph:
    """Look at the subject only: the small world's own mask node in front of every LikenessScore, and of every picture
    to be like, since its DINO knows nothing else.
    """
    graph = copy.deepcopy(graph)
    for node in [node for node in graph["nodes"] if node["type"] == "LikenessSimilarity" and not node["mode"]]:
        insert_mask(graph, node, "image", "mask")
    for node in [node for node in graph["nodes"] if node["type"] == "LikenessScore" and measures_identity(node)]:
        insert_mask(graph, node, "images", "mask")
        insert_mask(graph, node, "reference", "reference_mask")
    return graph


def measures_identity(node: Mapping[str, Any]) -> bool:
    """Whether a model for it is connected."""
    return any(entry["name"] in ("dino", "clip") and entry["link"] is not None for entry in node["inputs"])


def insert_mask(graph: Graph, node: dict[str, Any], image_input: str, mask_input: str) -> None:
    """Connect mask_input to a new mask node of what arrives at image_input."""
    slots = {entry["name"]: (index, entry) for index, entry in enumerate(node["inputs"])}
    origin = next((link for link in graph["links"] if link[0] == slots[image_input][1]["link"]), None)
    if origin is None:
        raise GraphError(f"Nothing is connected to {image_input} of the score node.")
    identity, first = graph["last_node_id"] + 1, graph["last_link_id"] + 1
    graph["last_node_id"], graph["last_link_id"] = identity, first + 1
    index, entry = slots[mask_input]
    entry["link"] = first + 1
    source = next(other for other in graph["nodes"] if other["id"] == origin[1])
    output = source["outputs"][origin[2]]
    output["links"] = [*(output["links"] or []), first]
    graph["links"] += [
        [first, origin[1], origin[2], identity, 0, "IMAGE"],
        [first + 1, identity, 0, node["id"], index, "MASK"],
    ]
    graph["nodes"].append(
        {
            "id": identity,
            "type": PLAYER,
            "pos": [node["pos"][0], node["pos"][1] - 200 - 100 * (mask_input == "mask")],
            "size": [340, 60],
            "flags": {},
            "order": len(graph["nodes"]),
            "mode": 0,
            "inputs": [{"name": "image", "type": "IMAGE", "link": first}],
            "outputs": [{"name": "mask", "type": "MASK", "links": [first + 1]}],
            "properties": {"Node name for S&R": PLAYER},
            "widgets_values": [],
        }
    )
