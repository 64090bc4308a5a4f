"""The shipped graphs in the toyworld: its models, its images, and the values that take the place of SD1.5's.

The values stand in toyworld/graphs: defaults.json for all graphs, and a file beside it for what one graph needs.
Standard library only at import; used by the demonstration, the thumbnails and the tests.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..toolbox.environment import ROOT, SANDBOX, Environment, step
from ..toolbox.graph import (
    BYPASSED,
    Graph,
    GraphError,
    ObjectInfo,
    adapt,
    all_nodes,
    flattened,
    load,
    matching_nodes,
)
from .mask_nodes import PLAYER, with_subject_masks

if TYPE_CHECKING:
    from . import world

MODELS = SANDBOX / "models"
WORKFLOWS = ROOT / "workflows"
VALUES, DEFAULTS, RENAMED = ROOT / "toyworld" / "graphs", "defaults", "renamed"
NODE_FOLDERS = {"ComfyUI-Likeness": ROOT, "likeness_small_world": ROOT / "toyworld" / "comfyui_nodes"}
CHECKPOINT = "likeness_small_world.safetensors"
ADAPTER = CHECKPOINT  # of that name in its own folder
NARROW_ADAPTER = "likeness_small_world_narrow.safetensors"  # for what NARROW_LOADER gives
STOCK_LOADER, NARROW_LOADER = "CheckpointLoaderSimple", "ToyworldLoadCheckpoint"
PLAYED = {
    "LikenessSubjectMask": PLAYER,
    "LikenessCaption": "ToyworldCaption",
    "UNETLoader": "ToyworldLoadModel",
    "CLIPLoader": "ToyworldLoadCLIP",
    "DualCLIPLoader": "ToyworldLoadCLIP",
    "VAELoader": "ToyworldLoadVAE",
}
TRANSFORMER = "small_world_flow"  # what the loaders among them give, if a graph's values do not say otherwise
ABSENT = ("LikenessLoadRetrieval",)
SIZE = 96
SUBJECT_SEED, SUBJECT_CLASS, SUBJECT_COLOR, SUBJECT_TEXTURE = 12, "dog", "red", "striped"
STYLE_SEED, STYLE_CLASS, STYLE_COLOR, STYLE_TEXTURE = 5, "cup", "yellow", "striped"
SOURCE_BACKGROUND, STYLE_BACKGROUND = "grass", "night"
PICTURE, STYLE_PICTURE = "small_world_subject.png", "small_world_style.png"
SECOND_PICTURE, SECOND_BACKGROUND, SECOND_SEED = "small_world_subject_2.png", "sand", 31
TRAINING_SET, TRAINING_SUBJECTS, TRAINING_PICTURES = "small_world_subjects", 3, 2
PAINTED_PICTURE = "small_world_painted.png"  # the subject's, with the subject painted as the page's mask editor does
EDITED_PICTURE, EDITED_SEED, EDITED_COLOR = "small_world_edited.png", 7, "green"

Settings = dict[tuple[str, str], Any]


def build_models(environment: Environment) -> Path:
    """Write the small world's models into the sandbox, anew when its assets have changed; returns their folder."""
    listed = ROOT / "toyworld" / "assets" / "SHA256SUMS"
    if not listed.exists():
        raise SystemExit(f"[setup] {listed.relative_to(ROOT)} is missing: check the clone out again.")

    def work() -> None:
        command = [environment.python, ROOT / "toyworld" / "run.py", "build", MODELS, "--comfyui", environment.comfyui]
        subprocess.run([str(part) for part in command], check=True, env=environment.variables())

    key = " ".join(line[:8] for line in listed.read_text().splitlines())
    last = MODELS / "likeness_adapters" / NARROW_ADAPTER
    step("small world", f"models of the assets {key}", last.is_file, work)
    return MODELS


def draw_subject(folder: Path) -> Path:
    """Write all pictures that graphs load, and a training set; returns the subject's first. Needs numpy and Pillow."""
    from PIL import Image

    from . import world

    for name, identity, background, seed in (
        (STYLE_PICTURE, style(), STYLE_BACKGROUND, STYLE_SEED),
        (PICTURE, subject(), SOURCE_BACKGROUND, SUBJECT_SEED),
        (SECOND_PICTURE, subject(), SECOND_BACKGROUND, SECOND_SEED),
        (EDITED_PICTURE, edited(), STYLE_BACKGROUND, EDITED_SEED),
    ):
        picture, mask = world.render(identity, background, seed)
        Image.fromarray(picture).save(folder / name)
        if name == PICTURE:
            painted = Image.fromarray(picture)
            painted.putalpha(Image.fromarray(255 - mask))
            painted.save(folder / PAINTED_PICTURE)
    draw_training_set(folder / TRAINING_SET)
    return folder / PICTURE


def draw_training_set(
    folder: Path, subjects: Iterable[int] = range(TRAINING_SUBJECTS), pictures: int = TRAINING_PICTURES
) -> Path:
    """Write pictures of many subjects, each in several places, with captions, masks and class nouns; returns folder."""
    import numpy
    from PIL import Image

    from . import world

    for number in subjects:
        identity = world.identity(1000 + number)
        own = folder / f"{identity.cls}_{number:03d}"
        own.mkdir(parents=True, exist_ok=True)
        places = numpy.random.default_rng([21, number]).permutation(list(world.BACKGROUNDS))
        for index, place in enumerate(map(str, places[:pictures])):
            picture, mask = world.render(identity, place, 100 * number + index)
            Image.fromarray(picture).save(own / f"{index}.png")
            Image.fromarray(mask).save(own / f"{index}.mask.png")
            caption = world.caption(identity, place, ("background",))
            (own / f"{index}.txt").write_text(caption, encoding="utf-8")
    return folder


def subject() -> world.Identity:
    from . import world

    return world.identity(SUBJECT_SEED, SUBJECT_CLASS, SUBJECT_COLOR, SUBJECT_TEXTURE)


def style() -> world.Identity:
    from . import world

    return world.identity(STYLE_SEED, STYLE_CLASS, STYLE_COLOR, STYLE_TEXTURE)


def edited() -> world.Identity:
    """Another one of the subject's class, in whose place it comes."""
    from . import world

    return world.identity(EDITED_SEED, SUBJECT_CLASS, EDITED_COLOR, "plain")


def sidecar(name: str) -> dict[str, Any]:
    """What toyworld/graphs says of a shipped graph, described in its README."""
    return json.loads((VALUES / f"{name}.json").read_text(encoding="utf-8"))


def present(name: str) -> str:
    """The present name of a graph that a release up to 0.5.0 shipped."""
    return sidecar(RENAMED).get(name, name)


def settings(name: str, graph: Graph, quick: bool = False) -> Settings:
    """The widget values for a shipped graph, or an older version of it; quick: with so few steps that it only runs."""
    merged: Settings = {}
    for kind in ("toyworld", "quick") if quick else ("toyworld",):
        for source in (DEFAULTS, name):
            for node, widgets in sidecar(source).get(kind, {}).items():
                for widget, value in widgets.items() if has(graph, node) else ():
                    merged.pop((node, widget), None)  # a later value also comes after those for other names of the node
                    merged[node, widget] = value
    return merged


def has(graph: Graph, name: str) -> bool:
    """Whether a node of the graph has this title or type."""
    return any(name in (node.get("title"), node["type"]) for node in all_nodes(graph))


def shipped(name: str) -> Graph:
    """A shipped graph as it is."""
    return load(WORKFLOWS / f"{name}.json")


def in_small_world(
    name: str,
    object_info: ObjectInfo,
    quick: bool = False,
    more: Mapping[tuple[str, str], Any] | None = None,
    graph: Graph | None = None,
) -> Graph:
    """A shipped graph with the toyworld's models, sizes and prompts, and with the judge's masks at the scores; what is
    inside subgraphs stands in their place.

    more: further widget values. graph: another version of the graph of this name.
    """
    graph = played(flattened(switched_on(graph or shipped(name)), object_info))
    return with_subject_masks(adapt(graph, {**settings(name, graph, quick), **(more or {})}, object_info))


def switched_on(graph: Graph) -> Graph:
    """The graph with the groups that are shipped bypassed, except those that need a model which is not there."""
    absent = {node["id"] for node in graph["nodes"] if node["type"] in ABSENT}
    absent |= {link[3] for link in graph["links"] if link[1] in absent}
    off = {node["id"] for node in graph["nodes"] if node["mode"] == BYPASSED} - absent
    return {**graph, "nodes": [{**node, "mode": 0} if node["id"] in off else node for node in graph["nodes"]]}


def played(graph: Graph) -> Graph:
    """The graph with the small world's own nodes in the place of those that need large models."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        if node["type"] in PLAYED:
            taken = [entry for entry in node["inputs"] if entry["name"] == "image"]
            player = PLAYED[node["type"]]
            node |= {"type": player, "inputs": taken, "widgets_values": [] if taken else [TRANSFORMER]}
            node["properties"] = {"Node name for S&R": player}
    return graph


def narrowed(graph: Graph) -> Graph:
    """The graph with the small world's checkpoints and adapter at their trained width."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        if node["type"] == STOCK_LOADER:
            node["type"] = NARROW_LOADER
        elif node["type"] == "LikenessLoadAdapter" and node["widgets_values"] == [ADAPTER]:
            node["widgets_values"] = [NARROW_ADAPTER]
    return graph


def store_graph(graph: Graph, base: Path, name: str) -> Path:
    """Put a graph where the page of the server at `base` lists the user's workflows."""
    path = base / "user" / "default" / "workflows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(graph))
    return path


def node_id(graph: Graph, title: str) -> str:
    """The id, as the server writes it, of the one node with this title."""
    found = matching_nodes(graph, title)
    if len(found) > 1:
        raise GraphError(f"{len(found)} nodes of the graph are titled {title}.")
    return str(found[0]["id"])
