"""Painting for the small world: silhouettes, backgrounds, patterns and emblems as anti-aliased layers (numpy, PIL).

Subject units: the subject spans about -0.5 to 0.5 in both directions, y pointing down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

EMBLEM_RADIUS = 0.14
STRIPE_PERIOD = 0.36
SPOT_PERIOD, SPOT_RADIUS = 0.36, 0.115
CHECK_CELL = 0.22
EYES = {"dog": ((0.33, -0.25),), "cat": ((-0.1, -0.17), (0.1, -0.17)), "fish": ((0.28, -0.06),)}
WHEELS = {"car": ((-0.27, 0.24), (0.27, 0.24))}

Polygon = list[tuple[float, float]]  # in subject units
Layer = tuple[np.ndarray, tuple[int, int, int]]  # coverage [H, W, 1] and colour


@dataclass(frozen=True)
class Pose:
    """Where the subject stands: scale, centre (both in units of the image side) and rotation in radians."""

    scale: float
    x: float
    y: float
    rotation: float


@lru_cache(maxsize=4)
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (y, x) in units of the image side."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return (y + 0.5) / size, (x + 0.5) / size


def step(distance: np.ndarray, pixels_per_unit: float) -> np.ndarray:
    """Anti-aliased coverage [H, W, 1]: 0 where `distance` is negative, 1 where positive, one pixel wide between."""
    return np.clip(distance * np.float32(pixels_per_unit) + np.float32(0.5), 0, 1)[..., None]


def _outline(cls: str) -> list[Polygon]:
    """The polygons whose union is the silhouette of a class, in subject units."""

    def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]

    def ellipse(x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles]

    if cls == "ball":
        return [ellipse(0, 0, 0.44, 0.44)]
    if cls == "dog":
        return [
            box(-0.36, -0.12, 0.26, 0.24),
            box(-0.36, 0.1, -0.18, 0.46),
            box(0.08, 0.1, 0.26, 0.46),
            ellipse(0.3, -0.22, 0.2, 0.19),
            box(0.3, -0.24, 0.54, -0.08),
            [(0.12, -0.34), (0.04, -0.02), (0.22, -0.1)],
            [(-0.34, -0.04), (-0.54, -0.34), (-0.42, -0.42), (-0.18, -0.1)],
        ]
    if cls == "cat":
        return [
            ellipse(0, 0.2, 0.28, 0.28),
            ellipse(0, -0.16, 0.25, 0.21),
            [(-0.25, -0.14), (-0.26, -0.5), (-0.02, -0.3)],
            [(0.25, -0.14), (0.26, -0.5), (0.02, -0.3)],
            [(0.16, 0.42), (0.48, 0.34), (0.54, -0.06), (0.41, -0.06), (0.36, 0.2), (0.16, 0.24)],
        ]
    if cls == "fish":
        return [
            ellipse(0.06, 0, 0.4, 0.28),
            [(-0.2, 0), (-0.52, -0.3), (-0.52, 0.3)],
            [(-0.04, -0.2), (0.12, -0.44), (0.24, -0.18)],
        ]
    if cls == "car":
        return [
            box(-0.5, -0.08, 0.5, 0.24),
            [(-0.36, -0.06), (-0.22, -0.36), (0.2, -0.36), (0.38, -0.06)],
            *(ellipse(x, y, 0.14, 0.14) for x, y in WHEELS["car"]),
        ]
    if cls == "house":
        return [box(-0.36, -0.08, 0.36, 0.44), [(-0.5, -0.06), (0, -0.5), (0.5, -0.06)]]
    if cls == "cup":
        return [
            [(-0.34, -0.4), (0.26, -0.4), (0.19, 0.42), (-0.27, 0.42)],
            [
                (0.2, -0.3),
                (0.5, -0.26),
                (0.5, 0.2),
                (0.16, 0.28),
                (0.18, 0.14),
                (0.37, 0.1),
                (0.37, -0.13),
                (0.2, -0.16),
            ],
        ]
    angles = -np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.27, 0.54)
    return [[(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]]


def silhouette(cls: str, pose: Pose, size: int, more: Sequence[Polygon] = ()) -> np.ndarray:
    """Coverage of the subject and of what it wears, float32 [H, W, 1] in 0..1, from a three times larger drawing."""
    side = 3 * size
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    for polygon in [*_outline(cls), *more]:
        draw.polygon(
            [
                (side * (pose.x + pose.scale * (cos * u - sin * v)), side * (pose.y + pose.scale * (sin * u + cos * v)))
                for u, v in polygon
            ],
            fill=255,
        )
    return np.asarray(canvas).reshape(size, 3, size, 3).mean((1, 3), dtype=np.float32)[..., None] / 255


def background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Background picture, float32 [H, W, 3] in 0..255."""
    y, x = grid(size)
    horizon = np.float32(rng.uniform(0.38, 0.52))
    if kind in ("grass", "sand", "snow", "sea"):
        ground = {"grass": (120, 190, 80), "sand": (230, 200, 140), "snow": (238, 243, 250), "sea": (30, 105, 150)}[
            kind
        ]
        sky = (170, 185, 205) if kind == "snow" else (160, 208, 245)
        below = step(y - horizon, size)
        floor = np.float32(ground) * (1.08 - 0.16 * y[..., None])
        if kind == "sea":
            floor = floor + 14 * np.sin(44 * y + 3 * np.sin(6 * x + np.float32(rng.uniform(0, 6.28))))[..., None]
        return (np.float32(sky) + 20 * y[..., None]) * (1 - below) + floor * below
    if kind == "night":
        moon_x, moon_y = rng.uniform(0.08, 0.14), rng.uniform(0.08, 0.13)
        disc = step(0.07 - np.hypot(x - np.float32(moon_x), y - np.float32(moon_y)), size)
        dark = np.float32((16, 18, 52)) + 26 * y[..., None] * np.float32((0.4, 0.5, 1))
        return dark * (1 - disc) + np.float32((240, 236, 200)) * disc
    if kind == "brick":
        rows = y * 6
        columns = (x * 3 + 0.5 * (np.floor(rows) % 2) + 0.25) % 1
        mortar = np.maximum(step(0.09 - columns, size / 3), step(0.17 - rows % 1, size / 6))
        return np.float32((170, 80, 60)) * (1 - mortar) + np.float32((205, 195, 185)) * mortar
    return np.float32((247, 247, 247)) - 10 * y[..., None] * np.ones(3, np.float32)


def pattern(texture: str, angle: str, u: np.ndarray, v: np.ndarray, pixels_per_unit: float) -> np.ndarray:
    """Coverage of the pattern colour, [H, W, 1]; (u, v) are subject units."""
    if texture == "striped":
        across = {"vertical": u, "horizontal": v, "diagonal": (u + v) * np.float32(0.7071)}[angle]
        return step(np.float32(STRIPE_PERIOD / 4) - np.abs(across % STRIPE_PERIOD - STRIPE_PERIOD / 2), pixels_per_unit)
    if texture == "spotted":
        row = np.floor(v / SPOT_PERIOD + 0.5)
        du = (u + (row % 2) * SPOT_PERIOD / 2) % SPOT_PERIOD - SPOT_PERIOD / 2
        return step(SPOT_RADIUS - np.hypot(du, v - row * SPOT_PERIOD), pixels_per_unit)
    if texture == "checkered":
        wave = np.sin(np.pi / CHECK_CELL * u) * np.sin(np.pi / CHECK_CELL * v)
        return step(wave * CHECK_CELL / np.pi, pixels_per_unit)
    return np.zeros((*u.shape, 1), np.float32)


def emblem(shape: str, du: np.ndarray, dv: np.ndarray, pixels_per_unit: float, r: float = EMBLEM_RADIUS) -> np.ndarray:
    """Coverage of an emblem of radius `r`, [H, W, 1]; (du, dv) are subject units from its centre."""
    if shape == "round":
        distance = r - np.hypot(du, dv)
    elif shape == "square":
        distance = 0.9 * r - np.maximum(np.abs(du), np.abs(dv))
    else:
        distance = np.minimum(0.8 * r - dv, (dv + 1.3 * r) * 0.5 - np.abs(du) * 0.87)
    return step(distance, pixels_per_unit)


def contact_sheet(images: list[np.ndarray], columns: int, scale: int = 1) -> Image.Image:
    """Lay equally large uint8 pictures out in rows."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, picture in enumerate(images):
        top, left = (index // columns) * height, (index % columns) * width
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet).resize((columns * width * scale, rows * height * scale), Image.Resampling.NEAREST)
