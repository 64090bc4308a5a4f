"""Harder subjects: the same classes with finer identity, told apart only by what is small.

Beside its pattern and emblem a fine identity has a second, smaller emblem, a patch on one of its two sides, up to three
thin lines and something that it wears. A near twin differs from it in exactly one of these. The generators have never
seen such subjects and have no words for what is fine: all of it has to come from the images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import painting, world

SECOND_RADIUS, PATCH_RADIUS = 0.085, 0.06
LINE_LENGTH, LINE_WIDTH, LINE_DISTANCE = 0.16, 0.042, 0.085
BAND_WIDTH = 0.07
HAT_WIDTH, HAT_HEIGHT = 0.3, 0.2
SIDES = ("left", "right")
MARK_COLORS = ("white", "black", "red", "yellow")
WORN = ("", "band", "hat")
WORN_COLORS = ("red", "yellow", "blue", "white")
CHANGES = ("second emblem", "side", "lines", "accessory")


@dataclass(frozen=True)
class Places:
    """Where the fine parts sit on a class, in subject units; the patch has a place on either side."""

    second: tuple[float, float]
    left: tuple[float, float]
    right: tuple[float, float]
    lines: tuple[float, float]
    band: float
    hat: tuple[float, float]


PLACES = {
    "ball": Places((0.0, -0.27), (-0.28, -0.06), (0.28, -0.06), (0.0, 0.33), 0.19, (0.0, -0.4)),
    "dog": Places((-0.27, 0.33), (-0.28, 0.02), (0.18, 0.06), (0.17, 0.34), 0.19, (0.3, -0.38)),
    "cat": Places((0.0, -0.04), (-0.2, 0.16), (0.2, 0.16), (0.0, 0.42), 0.05, (0.0, -0.33)),
    "fish": Places((-0.4, 0.0), (-0.2, 0.06), (0.26, 0.12), (0.04, 0.2), -0.19, (0.2, -0.22)),
    "car": Places((0.0, -0.22), (-0.38, 0.0), (0.38, 0.0), (0.23, 0.0), 0.2, (0.0, -0.34)),
    "house": Places((0.0, -0.2), (-0.26, 0.05), (0.26, 0.05), (0.26, 0.25), 0.39, (0.0, -0.42)),
    "cup": Places((-0.04, -0.26), (-0.24, 0.02), (0.14, 0.02), (-0.04, 0.26), 0.37, (-0.04, -0.38)),
    "star": Places((0.0, -0.26), (-0.25, -0.1), (0.25, -0.1), (0.0, 0.21), -0.14, (0.0, -0.44)),
}


@dataclass(frozen=True)
class FineIdentity(world.Identity):
    """An identity with its fine parts; empty strings and 0 mean "none"."""

    second_shape: str
    second_color: str
    side: str
    side_color: str
    lines: int
    lines_color: str
    worn: str
    worn_color: str

    def family(self) -> str:
        """Either side alike: a subject's twin with the patch on the other side is unique, and goes where it goes."""
        return repr(replace(self, side=""))

    def outline(self) -> list[painting.Polygon]:
        """The hat, if it wears one."""
        if self.worn != "hat":
            return []
        x, y = PLACES[self.cls].hat
        return [[(x - HAT_WIDTH / 2, y), (x, y - HAT_HEIGHT), (x + HAT_WIDTH / 2, y)]]

    def layers(self, u: np.ndarray, v: np.ndarray, pixels_per_unit: float) -> list[painting.Layer]:
        """Its fine parts."""
        at, colors, made = PLACES[self.cls], {**world.COLORS, **world.NEUTRALS}, []
        if self.worn == "hat":
            x, y = at.hat
            above = np.minimum(y - v, (v - y + HAT_HEIGHT) * 0.6 - np.abs(u - x) * 0.8)
            made.append((painting.step(above + np.float32(0.02), pixels_per_unit), colors[self.worn_color]))
        if self.worn == "band":
            within = BAND_WIDTH / 2 - np.abs(v - at.band)
            made.append((painting.step(within, pixels_per_unit), colors[self.worn_color]))
        for i in range(self.lines):
            x, y = at.lines[0] + (i - (self.lines - 1) / 2) * LINE_DISTANCE, at.lines[1]
            within = np.minimum(LINE_WIDTH / 2 - np.abs(u - x), LINE_LENGTH / 2 - np.abs(v - y))
            made.append((painting.step(within, pixels_per_unit), colors[self.lines_color]))
        x, y = getattr(at, self.side)
        made.append((painting.step(PATCH_RADIUS - np.hypot(u - x, v - y), pixels_per_unit), colors[self.side_color]))
        if self.second_shape:
            x, y = at.second
            mark = painting.emblem(self.second_shape, u - x, v - y, pixels_per_unit, SECOND_RADIUS)
            made.append((mark, colors[self.second_color]))
        return made


def _unlike(name: str, options: tuple[str, ...], *taken: str) -> str:
    """`name`, or the next of the options where it would not be seen on what has the colours `taken`."""
    start = options.index(name)
    return next(each for each in options[start:] + options[:start] if each not in taken)


def make_identity(base: world.Identity, drawn: dict[str, str | int]) -> FineIdentity:
    """A base identity with fine parts whose colours can be seen on it."""
    parts = dict(drawn)
    for key, options in (("second_color", MARK_COLORS), ("side_color", MARK_COLORS), ("worn_color", WORN_COLORS)):
        parts[key] = _unlike(str(parts[key]), options, base.color, base.pattern_color)
    parts["lines_color"] = _unlike(str(parts["lines_color"]), world.PATTERN_COLORS, base.pattern_color)
    for part, color in (("second_shape", "second_color"), ("lines", "lines_color"), ("worn", "worn_color")):
        if not parts[part]:
            parts[color] = ""
    return FineIdentity(**{name: getattr(base, name) for name in world.Identity.__dataclass_fields__}, **parts)


def _draw(rng: np.random.Generator) -> dict[str, str | int]:
    def one(options: tuple[str, ...]) -> str:
        return str(rng.choice(list(options)))

    return {
        "second_shape": one(("", *world.EMBLEM_SHAPES, *world.EMBLEM_SHAPES)), "second_color": one(MARK_COLORS),
        "side": one(SIDES), "side_color": one(MARK_COLORS),
        "lines": int(rng.integers(4)), "lines_color": one(world.PATTERN_COLORS),
        "worn": one(WORN), "worn_color": one(WORN_COLORS),
    }  # fmt: skip


def identity(seed: int, cls: str | None = None, color: str | None = None, texture: str | None = None) -> FineIdentity:
    """Draw the fine identity that belongs to `seed`; class, colour and texture can be fixed."""
    return make_identity(world.identity(seed, cls, color, texture), _draw(np.random.default_rng([11, seed])))


def variant(base: FineIdentity, change: str, seed: int) -> FineIdentity:
    """A near twin: the same subject but for one fine part, one of `CHANGES`."""
    keys = {
        "second emblem": ("second_shape", "second_color"),
        "side": ("side",),
        "lines": ("lines",),
        "accessory": ("worn", "worn_color"),
    }
    if change not in keys:
        raise ValueError(f'change is "{change}": it must be one of {", ".join(CHANGES)}.')
    rng = np.random.default_rng([12, seed])
    for _ in range(100):
        drawn = _draw(rng)
        mine = {name: getattr(base, name) or drawn[name] for name in drawn if name.endswith("_color")}
        kept = {name: getattr(base, name) for name in drawn if not name.endswith("_color")} | mine
        other = make_identity(_plain(base), kept | {name: drawn[name] for name in keys[change]})
        if other != base:
            return other
    raise RuntimeError(f"No variant of {base} in {change} was found in 100 draws.")


def _plain(idn: FineIdentity) -> world.Identity:
    return world.Identity(**{name: getattr(idn, name) for name in world.Identity.__dataclass_fields__})


def labels(idn: FineIdentity) -> tuple[int, ...]:
    """Class numbers of the fine parts: second emblem, its colour, side, its colour, lines, worn, its colour."""

    def index(value: str, options: tuple[str, ...]) -> int:
        return options.index(value) + 1 if value else 0

    return (
        index(idn.second_shape, world.EMBLEM_SHAPES),
        index(idn.second_color, MARK_COLORS),
        SIDES.index(idn.side),
        MARK_COLORS.index(idn.side_color),
        idn.lines,
        WORN.index(idn.worn),
        index(idn.worn_color, WORN_COLORS),
    )


LABELS = (4, 5, 2, 4, 4, 3, 5)
