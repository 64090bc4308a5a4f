"""The shipped graphs in the small world: its models, its pictures, and the settings that take the place of SD1.5's.

Standard library only at import; used by the demonstration, the thumbnails and the tests.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .environment import ROOT, SANDBOX, Environment, Steps
from .graph import BYPASSED, Graph, GraphError, ObjectInfo, adapt, load, matching
from .mask_nodes import PLAYER, with_subject_masks

if TYPE_CHECKING:
    from ..toyworld import world

MODELS = SANDBOX / "models"
WORKFLOWS = ROOT / "workflows"
NODE_FOLDERS = {"ComfyUI-Likeness": ROOT, "likeness_small_world": ROOT / "toyworld" / "comfyui_nodes"}
CHECKPOINT = "likeness_small_world.safetensors"
ADAPTER = CHECKPOINT  # of that name in its own folder
VISION = {
    "DINO (identity)": "small_world_measure",
    "CLIP (prompt)": "small_world_clip",
    "DINO (reference)": "small_world_measure",
    "DINO (similarity)": "small_world_dino",
}
PLAYED = {
    "LikenessSubjectMask": PLAYER,
    "UNETLoader": "ToyworldLoadModel",
    "DualCLIPLoader": "ToyworldLoadCLIP",
    "VAELoader": "ToyworldLoadVAE",
}
SMALL_WORLD, TINY_FLUX = "small world", "random tiny FLUX"  # what the loaders among them give
ABSENT = ("LikenessCaption", "LikenessLoadRetrieval")
SIZE, CFG, SAMPLING_STEPS = 96, 4.0, 20
SUBJECT_SEED, SUBJECT_CLASS, SUBJECT_COLOR, SUBJECT_TEXTURE = 12, "dog", "red", "striped"
SOURCE_BACKGROUND, TARGET_BACKGROUND, EDIT_TEXTURE = "grass", "sea", "spotted"
STYLE_SEED, STYLE_CLASS, STYLE_COLOR, STYLE_TEXTURE, STYLE_BACKGROUND = 5, "cup", "yellow", "striped", "night"
PICTURE, STYLE_PICTURE = "small_world_subject.png", "small_world_style.png"
SECOND_PICTURE, SECOND_BACKGROUND, SECOND_SEED = "small_world_subject_2.png", "sand", 31
SWAPPED_CLASS = "cat"
EDIT_RATIO = 0.6  # of the steps look at the subject: another one's colours must go
SWAPS_KIND = ("LikenessRenoise", "LikenessStagedEdit")  # they put a subject in the place of another of its class
TRAINING_SET, TRAINING_SUBJECTS, TRAINING_PICTURES = "small_world_subjects", 6, 2
ADAPTER_STEPS, ADAPTER_RATE, LOOK_RATIO = 40, 1e-4, 0.8
EDITED_PICTURE, EDITED_SEED, EDITED_COLOR = "small_world_edited.png", 7, "green"
STEPS, LEARNING_RATE, REFINING_RATE = 300, 0.02, 0.01  # the small world learns faster than SD1.5
TURBO_STEPS = 4  # whose first is not taken in an edit
ITERATIONS, LIKENESS_RATE, LIKENESS_STEPS, GRAD_STEPS = 50, 4e-3, 5, 3
LIKENESS_CFG = 4.5
TRAINING_LEVELS = "Steps of the training"  # the node's title
TUNING_METHOD, TUNING_STEPS, TUNING_RATE, CELLS = "full weights", 500, 2e-4, 24  # it has few weights: all of them
WHOLE_IMAGE = 0.5  # of the steps, beside patches: so many fewer steps than the paper's 10,000 suffice
SHIPPED_SIZE, SHIPPED_STEPS, SAVED_STEPS = 512, 1000, (200, 400, 700, 1000)  # of the shipped graphs

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
    Steps().do("small world", f"models of the assets {key}", (MODELS / "checkpoints" / CHECKPOINT).is_file, work)
    return MODELS


def draw_subject(folder: Path) -> Path:
    """Write all pictures that graphs load, and a training set; returns the subject's first. Needs numpy and Pillow."""
    from PIL import Image

    from ..toyworld import world

    for name, identity, background, seed in (
        (STYLE_PICTURE, style(), STYLE_BACKGROUND, STYLE_SEED),
        (PICTURE, subject(), SOURCE_BACKGROUND, SUBJECT_SEED),
        (SECOND_PICTURE, subject(), SECOND_BACKGROUND, SECOND_SEED),
        (EDITED_PICTURE, edited(), STYLE_BACKGROUND, EDITED_SEED),
    ):
        picture, _ = world.render(identity, background, seed)
        Image.fromarray(picture).save(folder / name)
    draw_training_set(folder / TRAINING_SET)
    return folder / PICTURE


def draw_training_set(
    folder: Path, subjects: Iterable[int] = range(TRAINING_SUBJECTS), pictures: int = TRAINING_PICTURES
) -> Path:
    """Write pictures of many subjects, each in several places, with captions, masks and class nouns; returns folder."""
    import numpy
    from PIL import Image

    from ..toyworld import world

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
    from ..toyworld import world

    return world.identity(SUBJECT_SEED, SUBJECT_CLASS, SUBJECT_COLOR, SUBJECT_TEXTURE)


def style() -> world.Identity:
    from ..toyworld import world

    return world.identity(STYLE_SEED, STYLE_CLASS, STYLE_COLOR, STYLE_TEXTURE)


def edited() -> world.Identity:
    """Another one of the subject's class, in whose place it comes."""
    from ..toyworld import world

    return world.identity(EDITED_SEED, SUBJECT_CLASS, EDITED_COLOR, "plain")


def texts() -> dict[str, str]:
    """The prompts of the shipped graphs by their titles. They name class and place, never what is the subject's own."""
    from ..toyworld import world

    def caption(place: str, *words: str) -> str:
        return world.caption(subject(), place, (*words, "background"))

    source, target = caption(SOURCE_BACKGROUND), caption(TARGET_BACKGROUND)
    other = world.caption(style(), STYLE_BACKGROUND, ("background",))
    kind, trained = f"a photo of a {SUBJECT_CLASS}", f"photo of a sks {SUBJECT_CLASS}"
    striped = f"a photo of a {SUBJECT_TEXTURE} {SUBJECT_CLASS}"
    places = {f"Prompt {index}": caption(place) for index, place in enumerate(("sand", "night", "brick"), 1)}
    textures = ("spotted", "checkered", "plain blue")
    edits = {
        title: f"a photo of a {words} {SUBJECT_CLASS}"
        for titles in (("Edit 1", "Edit 2", "Edit 3"), ("Stylise prompt", "Accessory prompt", "Age prompt"))
        for title, words in zip(titles, textures, strict=True)
    }
    return {
        "Source prompt": source,
        "Edit prompt": target,
        "Prompt of the edit": f"a photo of a {EDIT_TEXTURE} {SUBJECT_CLASS}",
        "Training prompt": trained,
        "Content's training prompt": trained,
        "Training prompt with it": f"photo of a sks {SUBJECT_TEXTURE} {SUBJECT_CLASS}",
        "Training prompt without it": trained,
        "Prompt with it": striped,
        "Prompt without it": f"a photo of a plain {SUBJECT_CLASS}",
        "Style's training prompt": f"photo of a sks {STYLE_CLASS}",
        "Prompt for both": f"{kind} {world.BACKGROUNDS[STYLE_BACKGROUND]}",
        "Prompt": kind,
        "Prompt of the training": f"{kind} {world.BACKGROUNDS['studio']}",
        "Prompt to score": target,
        "Prompt of the new picture": target,
        "Prompt of the picture": source,
        "Swapped prompt": source.replace(SUBJECT_CLASS, SWAPPED_CLASS),
        "Prompt of the picture to change": other,
        "Prompt of the result": kind,
        "Prompt of the reference": source,
        "What the subject is": kind,
        "Scene": target,
        "Negative of the first sampling": "",
        "What comes there": world.caption(edited(), STYLE_BACKGROUND, ("background",)),
        **places,
        **edits,
    }


def settings(graph: Graph, steps: int | None = None, sampling_steps: int = SAMPLING_STEPS) -> Settings:
    """What to change in a shipped graph, of any name, for it to run in the small world.

    steps: of every training, a multiple of 10; without, those that show the effect.
    """
    embedding_steps, tuning_steps = steps or STEPS, steps or TUNING_STEPS
    wanted: Settings = {
        ("CheckpointLoaderSimple", "ckpt_name"): CHECKPOINT,
        ("LoadImage", "image"): PICTURE,
        ("Picture of the style", "image"): STYLE_PICTURE,
        ("Picture to change", "image"): EDITED_PICTURE
        if any(has(graph, name) for name in SWAPS_KIND)
        else STYLE_PICTURE,
        ("Picture 2 of the subject", "image"): SECOND_PICTURE,
        **{(title, "cfg"): CFG for title in ("LikenessNullText", "LikenessReferenceGuide")},
        ("LikenessRefineEmbedding", "learning_rate"): REFINING_RATE,
        **swaps("Replace", SUBJECT_CLASS, SWAPPED_CLASS),
        **swaps("Replace by the word", STYLE_CLASS, SUBJECT_CLASS),
        **swaps("Replace by the subject", STYLE_CLASS, SUBJECT_CLASS),
        ("KSampler", "steps"): sampling_steps,
        ("KSampler", "cfg"): CFG,
        ("BasicScheduler", "steps"): TURBO_STEPS if has(graph, "LikenessRenoise") else sampling_steps,
        ("CFGGuider", "cfg"): CFG,
        ("LikenessGuider", "cfg"): CFG,
        ("LikenessTrainEmbedding", "steps"): embedding_steps,
        ("LikenessTrainEmbedding", "learning_rate"): LEARNING_RATE,
        ("LikenessTrainEmbedding", "save_every"): max(1, embedding_steps // 10),
        (TRAINING_LEVELS, "steps"): min(sampling_steps, LIKENESS_STEPS),
        (TRAINING_LEVELS, "scheduler"): "normal",
        **({("LikenessOptimizeLora", "cfg"): LIKENESS_CFG} if any(map(guided, graph["nodes"])) else {}),
        **({("Optimize", "grad_steps"): min(sampling_steps, GRAD_STEPS)} if has(graph, TRAINING_LEVELS) else {}),
        ("LikenessOptimizeLora", "iterations"): steps or ITERATIONS,
        ("LikenessOptimizeLora", "learning_rate"): LIKENESS_RATE,
        ("LikenessOptimizeLora", "text_rate"): LIKENESS_RATE / 1000,
        ("LikenessFineTune", "method"): TUNING_METHOD,
        ("LikenessFineTune", "steps"): tuning_steps,
        ("LikenessFineTune", "learning_rate"): TUNING_RATE,
        ("LikenessFineTune", "resolution"): SIZE,
        ("LikenessFineTune", "crops"): min(tuning_steps, SHIPPED_STEPS),
        ("Learn patches of the picture", "whole_image"): WHOLE_IMAGE,
        ("LikenessPositionMap", "cells"): CELLS,
        ("LikenessLoadAdapter", "name"): ADAPTER,
        ("LikenessEncodeSubject", "size"): SIZE,
        ("LikenessTrainAdapter", "folder"): TRAINING_SET,
        ("LikenessTrainAdapter", "size"): SIZE,
        ("LikenessTrainAdapter", "steps"): steps or ADAPTER_STEPS,
        ("LikenessTrainAdapter", "learning_rate"): ADAPTER_RATE,
        **{(title, "split_ratio"): LOOK_RATIO for title in ("Look as it was", "Look as trained")},
        ("SamplerCustom", "cfg"): CFG,
        ("LikenessStagedSampler", "steps"): sampling_steps,
        ("LikenessStagedSampler", "cfg"): CFG,
        ("LikenessStagedEdit", "steps"): sampling_steps,
        ("LikenessStagedEdit", "split_ratio"): EDIT_RATIO,
        ("A little room", "expand"): 2,
        ("Last 40 %", "step"): sampling_steps * 3 // 5,
        **{(f"After {saved} steps", "step"): max(1, embedding_steps * saved // SHIPPED_STEPS) for saved in SAVED_STEPS},
        **{(title, "name"): name for title, name in VISION.items()},
        **{key: value for node in graph["nodes"] for key, value in sizes(node)},
        **{(title, text_input(graph, title)): text for title, text in texts().items()},
    }
    if has(graph, "LikenessRenoise"):
        wanted["Prompt of the picture to change", "text"] = f"a photo of a {SUBJECT_CLASS} at night"
    return {key: value for key, value in wanted.items() if has(graph, key[0])}


def guided(node: Mapping[str, Any]) -> bool:
    """Whether this is a likeness optimisation with a negative prompt; no model of the small world does without one."""
    wanted = node["type"] == "LikenessOptimizeLora"
    return wanted and any(entry["name"] == "negative" and entry["link"] is not None for entry in node["inputs"])


def swaps(title: str, word: str, replacement: str) -> Settings:
    """The words of a LikenessReplaceSubject."""
    return {(title, "word"): word, (title, "replacement"): replacement}


def sizes(node: Mapping[str, Any]) -> list[tuple[tuple[str, str], int]]:
    """Widths and heights of a shipped node, as much smaller as the small world's pictures are."""
    empty = ("EmptyLatentImage", "EmptyHunyuanImageLatent", "EmptySD3LatentImage")
    first = {"ImageScale": 1, **dict.fromkeys(empty, 0)}.get(node["type"])
    if first is None:
        return []
    values = node["widgets_values"][first : first + 2]
    key = node.get("title") or node["type"]
    return [
        ((key, name), value * SIZE // SHIPPED_SIZE) for name, value in zip(("width", "height"), values, strict=True)
    ]


def text_input(graph: Graph, title: str) -> str:
    """The name of the widget that holds the prompt in the node of this title."""
    types = {node["type"] for node in graph["nodes"] if node.get("title") == title}
    return "value" if "PrimitiveStringMultiline" in types else "text"


def has(graph: Graph, name: str) -> bool:
    """Whether a node of the graph has this title or type."""
    return any(name in (node.get("title"), node["type"]) for node in graph["nodes"])


def shipped(name: str) -> Graph:
    """A shipped graph as it is."""
    return load(WORKFLOWS / f"{name}.json")


def in_small_world(
    graph: Graph,
    object_info: ObjectInfo,
    steps: int | None = None,
    sampling_steps: int = SAMPLING_STEPS,
    more: Mapping[tuple[str, str], Any] | None = None,
) -> Graph:
    """The graph with the small world's models, sizes and prompts, and with the judge's masks at the scores."""
    graph = played(switched_on(graph))
    changes = {**settings(graph, steps, sampling_steps), **(more or {})}
    return with_subject_masks(adapt(graph, changes, object_info))


def switched_on(graph: Graph) -> Graph:
    """The graph with the groups that are shipped bypassed, except those that need a model which is not there."""
    absent = {node["id"] for node in graph["nodes"] if node["type"] in ABSENT}
    absent |= {link[3] for link in graph["links"] if link[1] in absent}
    modes = {BYPASSED: 0}
    return {
        **graph,
        "nodes": [
            node if node["id"] in absent else {**node, "mode": modes.get(node["mode"], node["mode"])}
            for node in graph["nodes"]
        ],
    }


def played(graph: Graph) -> Graph:
    """The graph with the small world's own nodes in the place of those that need large models."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        if node["type"] in PLAYED:
            taken = [entry for entry in node["inputs"] if entry["name"] == "image"]
            player = PLAYED[node["type"]]
            node |= {"type": player, "inputs": taken, "widgets_values": [] if player == PLAYER else [SMALL_WORLD]}
            node["properties"] = {"Node name for S&R": player}
    return graph


def without_sana(graph: Graph) -> Graph:
    """The graph with the small world's checkpoint in the place of Sana, which has no small form that was trained."""
    if not has(graph, "LikenessLoadSana"):
        return graph
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        if node["type"] == "LikenessLoadSana":
            node |= {"type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": [CHECKPOINT]}
        elif node["type"] == "EmptyHunyuanImageLatent":
            node["type"] = "EmptyLatentImage"
        elif node["type"] == "BasicScheduler":
            node["widgets_values"][0] = "normal"  # what a checkpoint like SD1.5 is sampled with
    return graph


def store_graph(graph: Graph, base: Path, name: str) -> Path:
    """Put a graph where the page of the server at `base` lists the user's workflows."""
    path = base / "user" / "default" / "workflows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(graph))
    return path


def node_id(graph: Graph, title: str) -> str:
    """The id, as the server writes it, of the one node with this title."""
    found = matching(graph, title)
    if len(found) > 1:
        raise GraphError(f"{len(found)} nodes of the graph are titled {title}.")
    return str(found[0]["id"])
