"""Draws the sweep of effect_hiper as an image: identity and text score over tokens, steps and scale.

python toolbox/_load.py benchmarks.plot benchmarks/results/sweep_hiper.json docs/hiper_sweep.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

PANEL, MARGIN, GAP = (300, 220), 46, 24
COLORS = {"identity": (31, 99, 180), "text": (214, 110, 20)}
FIXED = {"tokens": 5, "scale": 0.8}


def panels(points: list[dict]) -> dict[str, list[dict]]:
    """For each of the three settings the points in which only it varies."""
    last = max(point["step"] for point in points)

    def kept(varied: str) -> list[dict]:
        fixed = {name: value for name, value in {**FIXED, "step": last}.items() if name != varied}
        found = [point for point in points if all(point[name] == value for name, value in fixed.items())]
        return sorted(found, key=lambda point: point[varied])

    return {varied: kept(varied) for varied in ("tokens", "step", "scale")}


class Panel:
    """One diagram on a shared canvas."""

    def __init__(self, draw, left: int, low: float, high: float) -> None:
        self.draw, self.left, self.low, self.high = draw, left, low, high

    def place(self, index: int, count: int, value: float) -> tuple[float, float]:
        x = self.left + 12 + (PANEL[0] - 24) * index / max(1, count - 1)
        return x, MARGIN + PANEL[1] * (1 - (value - self.low) / (self.high - self.low))

    def frame(self, title: str, ticks: Sequence[str]) -> None:
        bottom = MARGIN + PANEL[1]
        self.draw.rectangle([self.left, MARGIN, self.left + PANEL[0], bottom], outline=(150, 150, 150))
        self.draw.text((self.left + PANEL[0] / 2, MARGIN - 18), title, fill=0, anchor="mm")
        for index, tick in enumerate(ticks):
            self.draw.text((self.place(index, len(ticks), self.low)[0], bottom + 12), tick, fill=0, anchor="mm")
        for part in range(5):
            value = self.low + (self.high - self.low) * part / 4
            y = self.place(0, 1, value)[1]
            self.draw.line([self.left, y, self.left + PANEL[0], y], fill=(228, 228, 228))
            self.draw.text((self.left - 4, y), f"{value:.2f}", fill=0, anchor="rm")

    def curve(self, values: Sequence[float], color: tuple[int, int, int]) -> None:
        self.line([self.place(index, len(values), value) for index, value in enumerate(values)], color)

    def line(self, spots: Sequence[tuple[float, float]], color: tuple[int, int, int]) -> None:
        self.draw.line(spots, fill=color, width=2)
        for x, y in spots:
            self.draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)


def main(arguments: list[str]) -> int:
    """Read the sweep's JSON, write the image."""
    from PIL import Image, ImageDraw

    parser = argparse.ArgumentParser(prog="benchmarks.plot")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    points = json.loads(options.sweep.read_text())["points"]
    values = [point[name] for point in points for name in COLORS]
    low, high = min(values) - 0.02, max(values) + 0.02
    width = 3 * (PANEL[0] + MARGIN) + GAP
    canvas = Image.new("RGB", (width, PANEL[1] + 2 * MARGIN + 12), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (varied, chosen) in enumerate(panels(points).items()):
        panel = Panel(draw, MARGIN + index * (PANEL[0] + MARGIN), low, high)
        others = {
            "tokens": "after all steps, scale 0.8",
            "step": "5 tokens, scale 0.8",
            "scale": "5 tokens, after all steps",
        }
        panel.frame(f"{varied} ({others[varied]})", [f"{point[varied]:g}" for point in chosen])
        for name, color in COLORS.items():
            panel.curve([point[name] for point in chosen], color)
    for index, (name, color) in enumerate(COLORS.items()):
        x = MARGIN + 130 * index
        draw.line([x, canvas.height - 12, x + 24, canvas.height - 12], fill=color, width=3)
        draw.text((x + 30, canvas.height - 12), f"{name} score", fill=0, anchor="lm")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(options.picture)
    return 0
