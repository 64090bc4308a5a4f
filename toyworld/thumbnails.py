"""Makes the images of the template list: `python toyworld/thumbnails.py` runs the graphs in the toyworld.

Which results an image shows is said in toyworld/graphs, under "thumbnail".
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..toolbox.graph import Graph
    from ..toolbox.server import PromptRun, Server

ROOT = Path(__file__).resolve().parents[1]
TILE, QUALITY, STRIP = 192, 90, 16
SANA = "LikenessLoadSana"  # in whose place the flow transformer's checkpoint is loaded
FLOW = {("CheckpointLoaderSimple", "ckpt_name"): "likeness_small_world_flow.safetensors"}
OTHERS = {"flow_turbo": "flow transformer of few steps", "flow": "flow transformer", "turbo": "one-step model"}


def montage(pictures: list[Any]) -> Any:
    """The pictures side by side, equally high; one alone as it is."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0].convert("RGB")
    tiles = [
        picture.convert("RGB").resize((round(TILE * picture.width / picture.height), TILE), Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    sheet = Image.new("RGB", (sum(tile.width for tile in tiles), TILE))
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width
    return sheet


def halves(source: Any, result: Any) -> Any:
    """One square, as the template list shows it: on the left the middle of the source, on the right of the result."""
    from PIL import Image, ImageOps

    square = Image.new("RGB", (2 * TILE, 2 * TILE))
    for left, picture in ((0, source), (TILE, result)):
        whole = ImageOps.fit(picture.convert("RGB"), square.size)
        square.paste(whole.crop((TILE // 2, 0, TILE // 2 + TILE, 2 * TILE)), (left, 0))
    return square


def with_the_toyworlds_model(graph: Graph) -> Graph:
    """The graph of a transformer with what the toyworld's, of SD3's layout, needs."""
    loader = next((node for node in graph["nodes"] if node["type"] in ("UNETLoader", SANA)), None)
    if loader is None:
        return graph
    for node in graph["nodes"]:
        if node["type"] == SANA:
            node |= {"type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": [""]}
        elif node["type"] in ("EmptyHunyuanImageLatent", "EmptyFlux2LatentImage"):
            node["type"] = "EmptySD3LatentImage"
        elif node["type"] == "ModelSamplingAuraFlow":
            node["type"] = "ModelSamplingSD3"  # which tells the network times of SD3's scale
        elif node["type"] == "Flux2Scheduler":
            link = graph["last_link_id"] = graph["last_link_id"] + 1
            graph["links"].append([link, loader["id"], 0, node["id"], 0, "MODEL"])
            loader["outputs"][0]["links"].append(link)
            node |= {"type": "BasicScheduler", "widgets_values": ["simple", node["widgets_values"][0], 1.0]}
            node["inputs"] = [{"name": "model", "type": "MODEL", "link": link}]
    return graph


def drawn_by(graph: Graph) -> str:
    """Which of the toyworld's models beside the first one a graph in it runs on; "" for none."""
    used = str(graph["nodes"])
    return next((what for name, what in OTHERS.items() if f"small_world_{name}" in used), "")


def labelled(sheet: Any, what: str) -> Any:
    """An image with a line that says which model drew it."""
    from PIL import Image, ImageDraw

    line = Image.new("RGB", (sheet.width, STRIP), "white")
    ImageDraw.Draw(line).text((4, 2), f"drawn by the toyworld's {what}", fill="black")
    whole = Image.new("RGB", (sheet.width, sheet.height + STRIP))
    whole.paste(sheet, (0, 0))
    whole.paste(line, (0, sheet.height))
    return whole


def in_order(names: Iterable[str]) -> list[str]:
    """The graphs, each behind the one that saves what it loads."""
    from .workflows import sidecar

    wanted = set(names)
    pairs = [(sidecar(name).get("after", {}).get("graph"), name) for name in sorted(wanted)]
    return list(dict.fromkeys(name for pair in pairs for name in pair if name in wanted))


def pictures_of(name: str, server: Server, graph: Graph, run: PromptRun) -> list[Any]:
    """The pictures that the graph loads, then its results; of a sweep its sheet alone."""
    from PIL import Image

    from . import workflows

    titles = workflows.sidecar(name)["thumbnail"]
    results = [picture for title in titles for picture in server.images(run, workflows.node_id(graph, title))]
    if "LikenessSweepPlot" in {node["type"] for node in graph["nodes"]}:
        return results
    loaded = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoadImage"]
    return [*(Image.open(server.base / "input" / file) for file in loaded or [workflows.PICTURE]), *results]


def make(names: list[str], quick: bool) -> None:
    """Run the graphs one after the other, the saving one before the loading one, and write their pictures."""
    from ..toolbox.demonstration import Narrator
    from ..toolbox.environment import SANDBOX
    from ..toolbox.graph import convert
    from ..toolbox.server import Server, environment_from_variables
    from . import workflows

    base = SANDBOX / "thumbnails"
    shutil.rmtree(base / "models", ignore_errors=True)  # the graph that loads a subject names the first one saved
    server = Server(environment_from_variables(), base, workflows.NODE_FOLDERS, workflows.MODELS)
    workflows.draw_subject(base / "input")
    with server:
        for name in in_order(names):
            object_info = server.object_info()
            shipped = workflows.shipped(name)
            more = FLOW if workflows.has(shipped, SANA) else {}
            graph = workflows.in_small_world(name, object_info, quick, more, with_the_toyworlds_model(shipped))
            run = server.run(convert(graph, object_info), timeout=3600, on_event=Narrator())
            path = workflows.WORKFLOWS / f"{name}.jpg"
            pictures = pictures_of(name, server, graph, run)
            square = workflows.sidecar(name).get("square")
            sheet = halves(pictures[0], pictures[-1]) if square else montage(pictures)
            what = drawn_by(graph)
            (labelled(sheet, what) if what else sheet).save(path, quality=QUALITY)
            print(f"{path.relative_to(ROOT)} written", flush=True)


def main(arguments: list[str]) -> int:
    """Make the thumbnails anew; started in the sandbox's Python by the lines below."""
    parser = argparse.ArgumentParser(prog="thumbnails.py", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="graphs (default: all)")
    parser.add_argument("--quick", action="store_true", help="with the few steps of the tests, to try it")
    options = parser.parse_args(arguments)
    make(options.names or [path.stem for path in (ROOT / "workflows").glob("*.json")], options.quick)
    return 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT / "toolbox")
    from _load import set_up_and_run  # ty: ignore[import-not-found]

    sys.exit(set_up_and_run("toyworld.thumbnails", sys.argv[1:]))
