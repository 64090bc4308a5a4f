"""Draws the curves of effect_sine over K and v.

python toolbox/_load.py benchmarks.plot_sine benchmarks/results/sweep_sine.json docs/sine_sweep.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .plot import GAP, MARGIN, PANEL, Panel

COLORS = {"distance": (176, 42, 48), "text": (214, 110, 20), "identity": (31, 99, 180)}
TITLES = {"K": "K (v = 0.7)", "v": "v (K = 400)"}


def main(arguments: list[str]) -> int:
    """Distance to the source, text score and identity over each of the two settings."""
    from PIL import Image, ImageDraw

    parser = argparse.ArgumentParser(prog="benchmarks.plot_sine")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    found = json.loads(options.sweep.read_text())
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
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(options.picture)
    return 0
