"""Makes the pictures of the template list: `python toolbox/thumbnails.py` runs the graphs in the small world."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .graph import Graph
    from .server import Run, Server

ROOT = Path(__file__).resolve().parents[1]
TILE, QUALITY = 192, 90
TITLES = {
    "hiper_train_and_edit": ("Edit without the subject", "Edit with the subject"),
    "hiper_load_and_reuse": ("Result 1", "Result 2", "Result 3"),
    "hiper_pick_the_step": ("All steps",),
    "sine_edit": ("Base model alone", "Tuned model alone", "Guided edit"),
    "sine_load_and_edit": ("Result 1", "Result 2", "Result 3"),
    "sine_sweep": ("Grid",),
    "sine_faces": ("Stylise", "Accessory", "Age"),
    "sine_edit_wide": ("Wide, base model alone", "Wide, guided edit"),
    "sine_stock_loader": ("Guided edit",),
    "sine_style_transfer": ("Content alone", "Content and style"),
    "sine_style_generation": ("Without the style", "In the style"),
    "sine_remove_content": ("Still there", "Removed"),
    "invert_and_reconstruct": ("Autoencoder alone", "Back: plain", "Back: null-text", "Back: direct"),
    "invert_and_edit": ("Picture and edit",),
    "hifi_train_subject": ("Prompt alone", "One embedding", "Step-wise embedding"),
    "hifi_reference_guided": ("Unguided", "Guided by the reference"),
    "hifi_replace_subject": ("Picture and replaced subject",),
    "siso_generate": ("Without the LoRA", "With the LoRA"),
    "siso_sdxl_turbo": ("Without the LoRA", "With the LoRA"),
    "siso_flux": ("Without the LoRA", "With the LoRA"),
    "siso_references": ("Without the LoRA", "With the LoRA"),
    "siso_sana": ("Without the LoRA", "With the LoRA"),
    "siso_reuse": ("Result 1", "Result 2", "Result 3"),
    "siso_edit_sdxl_turbo": ("Picture again", "Edited picture"),
    "siso_edit_sd_turbo": ("Picture again", "Edited picture"),
    "ezigen_generate": ("Prompt alone", "Result"),
    "ezigen_steps": ("After the first sampling", "After loop 1", "After loop 3"),
    "ezigen_person": ("Result",),
    "ezigen_any_picture": ("Scene of the other model", "Result"),
    "ezigen_edit": ("Edited picture",),
    "ezigen_train_adapter": ("Prompt alone", "Adapter as it was", "Trained adapter"),
    "ezigen_with_hiper_and_sine": ("Prompt alone", "With the rows", "Guided too", "All three"),
    "hifi_ablation": ("Base", "+ mask", "+ regularisation", "+ step-wise", "+ reference"),
}


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


def pictures_of(name: str, server: Server, graph: Graph, run: Run) -> list[Any]:
    """The pictures that the graph loads, then its results; of a sweep its sheet alone."""
    from PIL import Image

    from . import small_world

    results = [picture for title in TITLES[name] for picture in server.images(run, small_world.node_id(graph, title))]
    if "LikenessSweepPlot" in {node["type"] for node in graph["nodes"]}:
        return results
    loaded = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoadImage"]
    return [*(Image.open(server.base / "input" / file) for file in loaded or [small_world.PICTURE]), *results]


def make(names: list[str], steps: int | None) -> None:
    """Run the graphs one after the other, the saving one before the loading one, and write their pictures."""
    from . import small_world
    from .demonstration import Narrator
    from .environment import SANDBOX
    from .graph import convert
    from .server import Server, environment_from_variables

    base = SANDBOX / "thumbnails"
    shutil.rmtree(base / "models", ignore_errors=True)  # the graph that loads a subject names the first one saved
    server = Server(environment_from_variables(), base, small_world.NODE_FOLDERS, small_world.MODELS)
    small_world.draw_subject(base / "input")
    with server:
        for name in names:
            object_info = server.object_info()
            shipped = small_world.without_sana(small_world.shipped(name))
            graph = small_world.in_small_world(shipped, object_info, steps)
            run = server.run(convert(graph, object_info), timeout=3600, on_event=Narrator())
            path = small_world.WORKFLOWS / f"{name}.jpg"
            montage(pictures_of(name, server, graph, run)).save(path, quality=QUALITY)
            print(f"{path.relative_to(ROOT)} written", flush=True)


def main(arguments: list[str]) -> int:
    """Make the thumbnails anew; started in the sandbox's Python by the lines below."""
    parser = argparse.ArgumentParser(prog="thumbnails.py", description=main.__doc__)
    parser.add_argument("names", nargs="*", default=list(TITLES), help="graphs (default: all)")
    parser.add_argument("--steps", type=int, default=None, help="training steps, a multiple of 10")
    options = parser.parse_args(arguments)
    make(options.names, options.steps)
    return 0


if __name__ == "__main__":
    from _load import set_up_and_run  # ty: ignore[import-not-found] (this folder is on the path of a script)

    sys.exit(set_up_and_run("toolbox.thumbnails", sys.argv[1:]))
