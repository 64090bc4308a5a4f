"""Draws the curves of effect_sine over K and v, and a sheet of its images like the paper's Fig. 6.

python toolbox/_load.py benchmarks.plot_sine curves benchmarks/results/sweep_sine.json docs/sine_sweep.png
python toolbox/_load.py benchmarks.plot_sine sheet docs/sine_fig6.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import hosting
from .plot import GAP, MARGIN, PANEL, Panel

COLORS = {"distance": (176, 42, 48), "text": (214, 110, 20), "identity": (31, 99, 180)}
TITLES = {"K": "K (v = 0.7)", "v": "v (K = 400)"}
SUBJECTS, SCALE = 4, 2
COLUMNS = ("source image", "base alone", "tuned alone", "guided")


def curves(found: dict[str, Any], picture: Path) -> None:
    """Distance to the source, text score and identity over each of the two settings."""
    from PIL import Image, ImageDraw

    values = [point[name] for varied in TITLES for point in found[f"over {varied}"] for name in COLORS]
    low, high = min(values) - 0.02, max(values) + 0.02
    canvas = Image.new("RGB", (2 * (PANEL[0] + MARGIN) + GAP, PANEL[1] + 2 * MARGIN + 12), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (varied, title) in enumerate(TITLES.items()):
        points = found[f"over {varied}"]
        panel = Panel(draw, MARGIN + index * (PANEL[0] + MARGIN), low, high)
        panel.frame(title, [f"{point[varied]:g}" for point in points])
        for name, color in COLORS.items():
            panel.curve([point[name] for point in points], color)
    labels = {"distance": "distance to the source", "text": "text score", "identity": "identity"}
    for index, (name, color) in enumerate(COLORS.items()):
        x = MARGIN + 190 * index
        draw.line([x, canvas.height - 12, x + 24, canvas.height - 12], fill=color, width=3)
        draw.text((x + 30, canvas.height - 12), labels[name], fill=0, anchor="lm")
    canvas.save(picture)


def sheet(picture: Path, threads: int) -> None:
    """One row for each subject: its image, and the first sample of each way to edit it, all from one noise."""
    hosting.start(threads)
    import torch
    from PIL import Image, ImageDraw

    from .effect_sine import Bench, Settings, edits
    from .subjects import SIDE

    bench, wide, left, top = Bench(Settings()), SIDE * SCALE, 210, 24
    canvas = Image.new("RGB", (left + len(COLUMNS) * (wide + 6), top + SUBJECTS * (wide + 6)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(COLUMNS):
        draw.text((left + column * (wide + 6) + wide / 2, top / 2), title, fill=0, anchor="mm")
    for row, edit in enumerate(edits(SUBJECTS)):
        tuned = bench.tune(edit)
        guided = bench.guided(edit, tuned)
        shown = [bench.image(edit.case).movedim(-1, 1)]
        shown += [bench.images(model, edit, edit.prompt)[:1] for model in (bench.world.model, tuned, guided)]
        for column, pixels in enumerate(shown):
            array = (pixels[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(array).resize((wide, wide), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (wide + 6), top + row * (wide + 6)))
        draw.text((6, top + row * (wide + 6) + wide / 2), f'"{edit.prompt}"', fill=0, anchor="lm")
    canvas.save(picture)


def main(arguments: list[str]) -> int:
    """Draw one of the two."""
    parser = argparse.ArgumentParser(prog="benchmarks.plot_sine")
    kinds = parser.add_subparsers(dest="kind", required=True)
    plotted = kinds.add_parser("curves")
    plotted.add_argument("sweep", type=Path)
    plotted.add_argument("picture", type=Path)
    drawn = kinds.add_parser("sheet")
    drawn.add_argument("picture", type=Path)
    drawn.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    if options.kind == "curves":
        curves(json.loads(options.sweep.read_text()), options.picture)
    else:
        sheet(options.picture, options.threads)
    return 0
