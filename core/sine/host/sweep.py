"""A sweep over K and v as one image: the results in a labelled grid, and their measures as curves.

The grid follows SINE's figures 7, 9 and 19 to 21, the curves follow its figure 8 (arXiv 2212.04489).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ...vision.host.scoring import NOT_MEASURED
from ...vision.host.sheets import (
    FONT_SIZE,
    INK,
    LARGEST,
    PAPER,
    SMALLEST,
    Font,
    as_image,
    centre,
    font,
    labelled_grid,
    thumbnail,
)
from ..sweep import Grid, mean_of_each_pair, timestep

WIDEST = 4096  # px, maximum width of a grid unless its images would fall below SMALLEST
FINE = 2  # supersampling factor of the plot, which smooths its lines
PANEL, LEFT, RIGHT, TOP, BOTTOM = (330, 210), 62, 24, 34, 44  # px of the plotting area and of the room around it
LEGEND = 110  # px
FAINT = (63, 63, 70)
FIRST, MIDDLE, LAST = (99, 110, 250), (45, 212, 191), (250, 204, 21)  # colours of the curves, from low to high
MOST_TICKS = 9

Panel = tuple[str, str, list[list[tuple[float, float]]], list[str], tuple[float, ...]]
"""One set of axes: titles of it and of x, curves of points (x, y), their names, and the values of x."""


def grid_sheet(images: Sequence[Tensor], grid: Grid) -> Tensor:
    """Images [H, W, C] in 0..1 -> [1, h, w, 3]: one row per K, one column per v, labelled at the edges."""
    largest = max(SMALLEST, min(LARGEST, WIDEST // len(grid.base_weights)))
    tiles = [[None if at is None else thumbnail(images[at], largest) for at in row] for row in grid.places]
    rows = [(f"end {end:g}", f"K {timestep(end)}") for end in grid.end_percents]
    return labelled_grid(tiles, rows, [f"v {weight:g}" for weight in grid.base_weights], size=FONT_SIZE + 2)


def measures(
    count: int, distance: list[float] | None, identity: list[float] | None, text: list[float] | None
) -> dict[str, list[float]]:
    """The curves to draw, by title: the connected measures, except those that Score Likeness had no model for.

    identity, a cosine, is drawn as the distance 1 - identity. Several values of a pair become their mean.
    """
    curves = {}
    for title, values in (("distance", distance), ("1 - identity", identity), ("text score", text)):
        if values is not None and any(value != NOT_MEASURED for value in values):
            shown = [1.0 - value for value in values] if title == "1 - identity" else values
            curves[title] = mean_of_each_pair(shown, count, title)
    return curves


def panels(title: str, values: Sequence[float], grid: Grid) -> list[Panel]:
    """A measure over v for each K and over K for each v; an axis with a single value is left out."""
    ks, vs = [f"K {timestep(end)}" for end in grid.end_percents], [f"v {weight:g}" for weight in grid.base_weights]
    over_v = f"{title} over v", "v (base_weight)", grid.over_base_weight(values), ks, grid.base_weights
    axis_of_k = "end_percent (K falls to the right)"
    over_k = f"{title} over K", axis_of_k, grid.over_end_percent(values), vs, grid.end_percents
    return [panel for panel in (over_v, over_k) if len(panel[-1]) > 1] or [over_v]


def plot_sheet(measures: Mapping[str, Sequence[float]], grid: Grid) -> Tensor:
    """{title: one value per result} -> [1, h, w, 3]: one row of panels per measure."""
    rows = [panels(title, values, grid) for title, values in measures.items()]
    width, height = LEFT + PANEL[0] + RIGHT + LEGEND, TOP + PANEL[1] + BOTTOM
    size = (width * max(len(row) for row in rows), height * len(rows))
    sheet = Image.new("RGB", (size[0] * FINE, size[1] * FINE), PAPER)
    draw, face = ImageDraw.Draw(sheet), font(FONT_SIZE * FINE)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            _draw_panel(draw, face, panel, (x * width + LEFT) * FINE, (y * height + TOP) * FINE)
    return as_image(sheet.resize(size, Image.Resampling.LANCZOS))


def _draw_panel(draw: ImageDraw.ImageDraw, face: Font, panel: Panel, left: int, top: int) -> None:
    width, height = PANEL[0] * FINE, PANEL[1] * FINE
    title, axis, curves, names, stops = panel
    low, high, ticks = nice_range([y for curve in curves for _, y in curve])
    first, span = stops[0], (stops[-1] - stops[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / span * width, top + (high - y) / (high - low) * height

    step = 6 * FINE
    draw.text((left, top - 26 * FINE), title, fill=INK, font=face)
    for tick in ticks:
        y = place(first, tick)[1]
        draw.line((left, y, left + width, y), fill=FAINT, width=FINE)
        text = f"{tick:g}"
        draw.text((left - draw.textlength(text, font=face) - step, y - 8 * FINE), text, fill=INK, font=face)
    for stop in thin_out(stops):
        x = place(stop, low)[0]
        draw.line((x, top + height, x, top + height + step / 2), fill=INK, width=FINE)
        centre(draw, x, top + height + step, f"{stop:g}", face)
    centre(draw, left + width / 2, top + height + 24 * FINE, axis, face)
    draw.line((left, top, left, top + height, left + width, top + height), fill=INK, width=FINE)
    labelled = thin_out(range(len(curves)))
    for k, (curve, name) in enumerate(zip(curves, names, strict=True)):
        color = shade(k, len(curves))
        points = [place(x, y) for x, y in curve]
        draw.line(points, fill=color, width=2 * FINE, joint="curve")
        for x, y in points:
            draw.ellipse((x - 3 * FINE, y - 3 * FINE, x + 3 * FINE, y + 3 * FINE), fill=color)
        if k in labelled:
            y = top + labelled.index(k) * 20 * FINE
            draw.line((left + width + 3 * step, y + 9 * FINE, left + width + 6 * step, y + 9 * FINE), color, 2 * FINE)
            draw.text((left + width + 7 * step, y), name, fill=INK, font=face)


def nice_range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Low end, high end and round ticks of an axis that covers all values."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0) * 0.1
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    bottom, top = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)  # 0.7 and 0.7000000001 are one tick
    if bottom == top:
        bottom, top = bottom - 1, top + 1
    return bottom * step, top * step, [round(k * step, 12) for k in range(bottom, top + 1)]


def thin_out(stops: Sequence) -> list:
    """At most MOST_TICKS of the values, evenly spaced, so that their labels do not overlap."""
    return list(stops)[:: max(1, math.ceil(len(stops) / MOST_TICKS))]


def shade(index: int, count: int) -> tuple[int, int, int]:
    """A colour between FIRST and LAST, through MIDDLE."""
    place = index / max(count - 1, 1)
    red, green, blue = (np.interp(place, (0.0, 0.5, 1.0), channel) for channel in zip(FIRST, MIDDLE, LAST, strict=True))
    return round(red), round(green), round(blue)
