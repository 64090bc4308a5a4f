"""Draws the curves of fast_hiper, fast_siso, fast_sine or fast_hifi: identity and text score over the steps, in one row
for each set.

    python toolbox/_load.py benchmarks.plot_fast benchmarks/results/fast_hiper.json docs/hiper_fast.png

Where the published training was taken from a stored run, only its end is known. HiFi Tuner's steps are the updates of
its second stage, after the same first one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .plot import GAP, MARGIN, PANEL, Panel

GRAY = (130, 130, 130)
COLORS = {"published": GRAY, "fast": (31, 99, 180), "full": GRAY, "published rate": GRAY}
SETS = {"plain": "", "fine parts": ", subjects with fine parts"}
NOISES = {"one noise": ", one noise", "new noise": ", new noises"}
STARTS = ("without", "fast, stage one", "base")  # what no step was made of


def points(curve: dict[str, Any], way: str, score: str) -> dict[int, float]:
    """The score over the passes, from none on."""
    ends = [kind.partition(f"{way} @ ")[2] for kind in curve]
    found = {int(end): each[score] for end, each in zip(ends, curve.values(), strict=True) if end}
    start = next(name for name in STARTS if name in curve)
    return {0: curve[start][score], **found} if len(found) > 1 else found


def rows_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The curves of each set of subjects or of noises, by what its title adds; of all, where there are no sets."""
    if SETS.keys() <= summary.keys():
        return {title: summary[name] for name, title in SETS.items()}
    if NOISES.keys() <= summary["all"].keys():
        return {title: summary["all"][name] for name, title in NOISES.items()}
    return {"": summary["all"]}


def main(arguments: list[str]) -> int:
    """Read the results, write the image."""
    from PIL import Image, ImageDraw

    parser = argparse.ArgumentParser(prog="benchmarks.plot_fast")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text())
    rows, height = rows_of(found["summary"]), PANEL[1] + 2 * MARGIN - 18
    ways = [way for way in COLORS if any(points(curve, way, "text") for curve in rows.values())]
    canvas = Image.new("RGB", (2 * (PANEL[0] + MARGIN) + GAP, len(rows) * height + 24), "white")
    for row, (title, curve) in enumerate(rows.items()):
        part = Image.new("RGB", (canvas.width, height), "white")
        for index, score in enumerate(("identity", "text")):
            lines = {way: points(curve, way, score) for way in ways}
            passes = sorted({0}.union(*lines.values()))
            values = [value for line in lines.values() for value in line.values()]
            left, low, high = MARGIN + index * (PANEL[0] + MARGIN), min(values) - 0.02, max(values) + 0.02
            panel = Panel(ImageDraw.Draw(part), left, low, high)
            panel.frame(f"{score} over steps{title}", [str(each) for each in passes])
            for way, line in lines.items():
                spots = [panel.place(passes.index(each), len(passes), value) for each, value in line.items()]
                panel.line(spots, COLORS[way])
        canvas.paste(part, (0, row * height))
    draw = ImageDraw.Draw(canvas)
    for index, way in enumerate(ways):
        x, y = MARGIN + 190 * index, canvas.height - 14
        draw.line([x, y, x + 24, y], fill=COLORS[way], width=3)
        settings = found["settings"].get("ways", found["settings"]).items()
        rates = {each.get("rate") or each["inner_rate"] for kind, each in settings if way in kind.split(" @ ")[0]}
        text = " and ".join(f"{rate:g}" for rate in sorted(rates))
        draw.text((x + 30, y), f"{way}, learning rate {text}", fill=0, anchor="lm")
    canvas.save(options.picture)
    return 0
