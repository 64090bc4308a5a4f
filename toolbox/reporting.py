"""The report that report.py makes: every start graph that fits a checkpoint, on the user's own ComfyUI and card."""

import argparse
import base64
import html
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._load import ROOT
from .environment import Environment
from .graph import Graph, GraphError, ObjectInfo, active_nodes, adapt, convert, flattened, load, widget_slots
from .server import PromptError, Server

GRAPHS = {"1": "HiPer", "2": "SINE", "3": "EZIGen", "4": "Inversion", "6": "SISO", "7": "Three methods"}
LEARNING = {  # the widgets whose product with --share is the number of updates
    "LikenessTrainEmbedding": "steps",
    "LikenessFineTune": "steps",
    "LikenessRefineEmbedding": "inner_steps",
    "LikenessNullText": "inner_steps",
    "LikenessOptimizeLora": "iterations",
}
FAST = 0.3
PAUSE = 0.5  # seconds between two looks at the memory


@dataclass
class Outcome:
    """What one graph did. images: files by the node's title; problem: what ComfyUI said instead."""

    method: str
    graph: str
    seconds: float = 0.0
    memory: float = 0.0
    images: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.py", description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="SD1.x, SD2.x, SDXL or SDXL-turbo file")
    parser.add_argument("--image", type=Path, required=True, help="a photo of the subject")
    parser.add_argument("--subject", required=True, help='such as "a dog"')
    parser.add_argument("--place", default="on the grass", help="where the photo shows it")
    parser.add_argument("--new", default="on a beach", help="the new place")
    parser.add_argument("--size", type=int, default=512, help="side of the images; 1024 for SDXL")
    parser.add_argument("--share", type=float, default=1.0, help="share of the published updates")
    parser.add_argument("--fast", dest="share", action="store_const", const=FAST, help=f"the same as --share {FAST}")
    parser.add_argument("--only", nargs="+", choices=GRAPHS, default=list(GRAPHS), help="numbers of start graphs")
    parser.add_argument("--comfyui", type=Path, help="your ComfyUI (default: the one whose custom_nodes hold the pack)")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")
    parser.add_argument("--out", type=Path, default=Path("likeness_report"), help="folder of the report")
    options = parser.parse_args(arguments)
    options.comfyui = options.comfyui or Path(os.environ.get("COMFYUI_PATH") or ROOT.parents[1])
    needed = {"--comfyui": options.comfyui / "main.py", "--checkpoint": options.checkpoint, "--image": options.image}
    for what, path in needed.items():
        if not path.is_file():
            parser.error(f"{what}: there is no file {path}")
    return options


def settings(options: argparse.Namespace, graph: Graph, object_info: ObjectInfo) -> dict[tuple[str, str], Any]:
    """The user's photo and words in the widgets of a start graph, as far as it has them."""
    source, new = (f"a photo of {options.subject} {place}" for place in (options.place, options.new))
    word = options.subject.split()[-1]
    wanted: dict[tuple[str, str], Any] = {
        ("CheckpointLoaderSimple", "ckpt_name"): options.checkpoint.name,
        ("LoadImage", "image"): options.image.name,
        ("What the photo shows", "value"): source,
        ("What the subject is", "value"): f"a photo of {options.subject}",
        ("New picture", "value"): new,
        ("The changed photo", "value"): new,
        ("Picture", "value"): f"a photo of {options.subject}",
        ("Swap", "word"): word,
        ("Swap", "replacement"): "cat" if word != "cat" else "dog",
        ("Size", "value"): options.size,
    }
    widgets = {
        (name, slot.name)
        for node in active_nodes(graph)
        for slot in widget_slots(node["type"], object_info)
        for name in (node["type"], node.get("title"))
    }
    return {key: value for key, value in wanted.items() if key in widgets}


def shortened(prompt: dict[str, Any], share: float) -> dict[str, Any]:
    """The prompt with this share of the updates of every node that learns."""
    for node in prompt.values():
        widget = LEARNING.get(node["class_type"], "")
        if isinstance(node["inputs"].get(widget), int):
            node["inputs"][widget] = max(1, round(share * node["inputs"][widget]))
    return prompt


def used(server: Server) -> float:
    """Memory of the card (on a CPU: of the machine) in use, in GB."""
    device = server.get("/system_stats")["devices"][0]
    return (device["vram_total"] - device["vram_free"]) / 2**30


def follow(server: Server, prompt: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Queue a prompt and wait; its outputs. Seconds, the peak of the memory and a problem go to the outcome."""
    before, begun = used(server), time.monotonic()
    identity = server.queue(prompt)
    while not (history := server.get(f"/history/{identity}")):
        outcome.memory = max(outcome.memory, used(server) - before)
        time.sleep(PAUSE)
    outcome.seconds = time.monotonic() - begun
    status = history[identity]["status"]
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            outcome.problem = f"{data['node_type']}: {data['exception_message']}"
    return history[identity]["outputs"]


def ran(server: Server, options: argparse.Namespace, number: str, object_info: ObjectInfo) -> Outcome:
    """Run one start graph; a refusal is an outcome too."""
    path = next((ROOT / "workflows").glob(f"{number} Start*.json"))
    outcome = Outcome(GRAPHS[number], path.stem)
    try:
        graph = flattened(load(path), object_info)
        graph = adapt(graph, settings(options, graph, object_info), object_info)
        outputs = follow(server, shortened(convert(graph, object_info), options.share), outcome)
    except (GraphError, PromptError) as problem:
        outcome.problem = problem.sentences() if isinstance(problem, PromptError) else str(problem)
        return outcome
    for node in active_nodes(graph):
        shown = outputs.get(str(node["id"]), {})
        title = node.get("title") or node["type"]
        for index, entry in enumerate(shown.get("images", [])):
            name = f"{number}_{title}_{index}.png".replace(" ", "_")
            (options.out / name).write_bytes(server.get_bytes("/view", **entry))
            outcome.images.setdefault(title, []).append(name)
        if shown.get("text"):
            outcome.texts[title] = "\n".join(map(str, shown["text"]))
    return outcome


def page(options: argparse.Namespace, machine: Mapping[str, Any], outcomes: list[Outcome]) -> str:
    """The report as one HTML file with its images inside."""

    def image(path: Path) -> str:
        return f'<img alt="" height="220" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

    rows = []
    for each in outcomes:
        figures = html.escape(each.problem) if each.problem else f"{each.seconds:.0f} s, {each.memory:.1f} GB more"
        texts = "".join(f"<pre>{html.escape(title)}\n{html.escape(text)}</pre>" for title, text in each.texts.items())
        shown = ""
        for title, names in each.images.items():
            pictures = "".join(image(options.out / name) for name in names)
            shown += f"<figure>{pictures}<figcaption>{html.escape(title)}</figcaption></figure>"
        rows.append(f"<h2>{html.escape(each.method)}: {html.escape(each.graph)}</h2><p>{figures}</p>{shown}{texts}")
    about = html.escape(json.dumps(machine, indent=1))
    style = "body{font:15px sans-serif;max-width:1200px;margin:2em auto}figure{display:inline-block;margin:4px}"
    head = f'<meta charset="utf-8"><title>ComfyUI-Likeness report</title><style>{style}</style>'
    photo = image(options.image)
    return f"<!doctype html>{head}<h1>ComfyUI-Likeness</h1>{photo}<pre>{about}</pre>{''.join(rows)}"


def machine_of(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    stats = server.get("/system_stats")
    device, system = stats["devices"][0], stats["system"]
    return {
        "device": device["name"],
        "memory GB": round(device["vram_total"] / 2**30, 1),
        "system": platform.platform(),
        "comfyui": system.get("comfyui_version"),
        "torch": system.get("pytorch_version"),
        "checkpoint": options.checkpoint.name,
        "checkpoint GB": round(options.checkpoint.stat().st_size / 2**30, 2),
        "size": options.size,
        "share of the published updates": options.share,
        "subject": options.subject,
    }


def main(arguments: list[str]) -> int:
    """Run the start graphs with a checkpoint and a photo; write images, seconds and memory as report.html and .json."""
    options = parse(arguments)
    options.out = options.out.resolve()  # ComfyUI runs in a folder of its own
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.out / "comfyui"
    environment = Environment(Path(sys.executable), options.comfyui.resolve(), None, None)
    server = Server(environment, base, {"ComfyUI-Likeness": ROOT}, options.comfyui / "models", cpu=options.cpu)
    folders = base / "extra_model_paths.json"  # the user's models are in it already
    own = {"base_path": str(options.checkpoint.resolve().parent), "checkpoints": "."}
    folders.write_text(json.dumps({**json.loads(folders.read_text()), "checkpoint": own}))
    shutil.copy(options.image, base / "input" / options.image.name)
    outcomes: list[Outcome] = []
    with server:
        machine, object_info = machine_of(server, options), server.object_info()
        for number in options.only:
            print(f"[report] {GRAPHS[number]} ...", flush=True)
            outcomes.append(ran(server, options, number, object_info))
            print(f"[report] {outcomes[-1].problem or f'{outcomes[-1].seconds:.0f} s'}")
            log = server.log().splitlines()[-400:]
            record = {"machine": machine, "outcomes": [vars(each) for each in outcomes], "log": log}
            (options.out / "report.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            (options.out / "report.html").write_text(page(options, machine, outcomes), encoding="utf-8")
    print(f"[report] {options.out / 'report.html'}")
    return int(all(outcome.problem for outcome in outcomes))
