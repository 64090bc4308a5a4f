"""Deterministic generator of captioned 96 px scenes: one subject with an identity, before one of seven backgrounds.

Only numpy and PIL are needed. Every attribute of an identity has a word, so that text can express whatever a
personalization method has to recover; training captions drop the words at random. Patterns are large and their phase is
fixed, because they must survive an autoencoder that keeps 12 x 12 latents. Scenes whose combination of class, colour,
texture and background is "held out" never occur in training data: every evaluation uses those.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from . import painting
from .painting import Pose

SIZE = 96
CLASSES = ("ball", "dog", "cat", "fish", "car", "house", "cup", "star")
COLORS = {
    "red": (212, 34, 34),
    "orange": (246, 134, 20),
    "yellow": (246, 222, 40),
    "green": (24, 140, 50),
    "cyan": (40, 200, 210),
    "blue": (36, 72, 216),
    "purple": (128, 46, 172),
}
TEXTURES = ("plain", "striped", "spotted", "checkered")
NEUTRALS = {"white": (250, 250, 248), "black": (22, 22, 28)}
PATTERN_COLORS = tuple(NEUTRALS)
ANGLES = ("vertical", "horizontal", "diagonal")
TONES = ("", "light", "dark")
EMBLEM_SHAPES = ("round", "square", "triangle")
EMBLEM_COLORS = ("white", "black", "red", "yellow")
BACKGROUNDS = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "sea": "in the sea",
    "night": "at night",
    "brick": "in front of a brick wall",
    "studio": "on a white background",
}
PATTERN_NOUNS = {"striped": "stripes", "spotted": "spots", "checkered": "checks"}
ALL_WORDS = ("tone", "color", "texture", "pattern", "angle", "emblem", "emblem_color", "emblem_shape", "background")
MAIN_WORDS = ("color", "texture", "background")

# Share of all (class, colour, texture, background) combinations that training never sees: one in ten.
HELD_OUT_MODULUS = 10
# Where the emblem sits, in subject units: the subject spans about -0.5 to 0.5 in both directions, y pointing down.
EMBLEM_AT = {
    "ball": (0.0, 0.0), "dog": (-0.06, 0.06), "cat": (0.0, 0.22), "fish": (0.02, 0.0),
    "car": (0.0, 0.06), "house": (0.0, 0.14), "cup": (-0.04, 0.02), "star": (0.0, 0.04),
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """One subject: what must stay the same in every picture of it. Empty strings mean "none"."""

    cls: str
    color: str
    tone: str
    texture: str
    pattern_color: str
    angle: str
    emblem_shape: str
    emblem_color: str

    def family(self) -> str:
        """What decides whether a subject is kept for checking."""
        return repr(self)

    def outline(self) -> list[painting.Polygon]:
        """What the subject wears beyond the silhouette of its class."""
        return []

    def layers(self, u: np.ndarray, v: np.ndarray, pixels_per_unit: float) -> list[painting.Layer]:
        """What is painted on the subject after its pattern and its emblem: coverages and colours, in this order."""
        return []


def make_identity(
    cls: str, color: str, tone: str, texture: str, pattern_color: str, angle: str, emblem_shape: str, emblem_color: str
) -> Identity:
    """An identity without meaningless attributes: plain subjects have no pattern colour, only stripes have an angle."""
    if texture == "plain":
        pattern_color = ""
    if texture != "striped":
        angle = ""
    if not emblem_shape:
        emblem_color = ""
    elif emblem_color in (color, pattern_color):
        # An emblem in the subject's own colour could not be seen: take the next colour that differs from both.
        start = EMBLEM_COLORS.index(emblem_color)
        order = EMBLEM_COLORS[start:] + EMBLEM_COLORS[:start]
        emblem_color = next(name for name in order if name not in (color, pattern_color))
    return Identity(cls, color, tone, texture, pattern_color, angle, emblem_shape, emblem_color)


def identity(seed: int, cls: str | None = None, color: str | None = None, texture: str | None = None) -> Identity:
    """Draw the identity that belongs to `seed`; class, colour and texture can be fixed."""
    rng = np.random.default_rng([1, seed])
    drawn = [
        str(rng.choice(list(options)))
        for options in (CLASSES, COLORS, TEXTURES, PATTERN_COLORS, ANGLES, EMBLEM_SHAPES, EMBLEM_COLORS)
    ]
    tone = str(rng.choice(TONES, p=(0.5, 0.25, 0.25)))
    shape = drawn[5] if rng.random() < 0.5 else ""
    return make_identity(
        cls or drawn[0], color or drawn[1], tone, texture or drawn[2], drawn[3], drawn[4], shape, drawn[6]
    )


def variant(base: Identity, attribute: str, seed: int) -> Identity:
    """The same subject with one attribute changed: "pattern" (texture, colour or angle), "emblem" or "tone"."""
    rng = np.random.default_rng([2, seed])
    for _ in range(100):
        if attribute == "pattern":
            other = replace(
                base,
                texture=str(rng.choice(TEXTURES)),
                pattern_color=str(rng.choice(PATTERN_COLORS)),
                angle=str(rng.choice(ANGLES)),
            )
        elif attribute == "emblem":
            other = replace(
                base, emblem_shape=str(rng.choice(("", *EMBLEM_SHAPES))), emblem_color=str(rng.choice(EMBLEM_COLORS))
            )
        elif attribute == "tone":
            other = replace(base, tone=str(rng.choice(TONES)))
        else:
            raise ValueError(f'attribute is "{attribute}": it must be "pattern", "emblem" or "tone".')
        other = make_identity(**vars(other))
        if other != base:
            return other
    raise RuntimeError(f"No variant of {base} in {attribute} was found in 100 draws.")


def held_out(cls: str, color: str, texture: str, background: str) -> bool:
    """True for the combinations that training data never contain."""
    return zlib.crc32(f"{cls} {color} {texture} {background}".encode()) % HELD_OUT_MODULUS == 0


def held_out_combinations() -> list[tuple[str, str, str, str]]:
    """All held-out (class, colour, texture, background) combinations, in a fixed order."""
    return [
        (c, k, t, b) for c in CLASSES for k in COLORS for t in TEXTURES for b in BACKGROUNDS if held_out(c, k, t, b)
    ]


def draw_pose(rng: np.random.Generator) -> Pose:
    """A small random pose; subjects always face right."""
    return Pose(
        float(rng.uniform(0.76, 0.88)),
        float(rng.uniform(0.46, 0.54)),
        float(rng.uniform(0.48, 0.55)),
        float(rng.uniform(-0.08, 0.08)),
    )


def body_color(idn: Identity) -> np.ndarray:
    """The subject's main colour with its tone, float32 [3] in 0..255."""
    rgb = np.float32(COLORS[idn.color])
    if idn.tone == "light":
        return rgb * 0.6 + 255 * 0.4
    return rgb * 0.6 if idn.tone == "dark" else rgb


def render(
    idn: Identity, background: str, seed: int, size: int = SIZE, pose: Pose | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Returns the picture, uint8 [size, size, 3], and the subject's mask, uint8 [size, size] in 0..255. `seed` decides the
    pose (unless given) and the background's details.
    """
    rng = np.random.default_rng([3, seed])
    drawn = draw_pose(rng)
    pose = pose or drawn
    picture = painting.background(background, size, rng)
    coverage = painting.silhouette(idn.cls, pose, size, idn.outline())
    y, x = painting.grid(size)
    scale, unit = np.float32(pose.scale), size * pose.scale
    cos, sin = np.float32(np.cos(pose.rotation)), np.float32(np.sin(pose.rotation))
    du, dv = (x - np.float32(pose.x)) / scale, (y - np.float32(pose.y)) / scale
    u, v = cos * du + sin * dv, cos * dv - sin * du
    marks = painting.pattern(idn.texture, idn.angle, u, v, unit)
    surface = body_color(idn) * (1 - marks)
    if idn.pattern_color:
        surface = surface + np.float32(NEUTRALS[idn.pattern_color]) * marks
    surface = surface * (1 - 0.14 * np.clip(v + np.float32(0.1), -0.3, 0.6))[..., None]
    layers: list[painting.Layer] = []
    for at in painting.WHEELS.get(idn.cls, ()):
        layers.append((painting.step(0.14 - np.hypot(u - at[0], v - at[1]), unit), (60, 60, 66)))
    if idn.emblem_shape:
        at = EMBLEM_AT[idn.cls]
        rgb = {**COLORS, **NEUTRALS}[idn.emblem_color]
        layers.append((painting.emblem(idn.emblem_shape, u - at[0], v - at[1], unit), rgb))
    layers += idn.layers(u, v, unit)
    for at in painting.EYES.get(idn.cls, ()):
        away = np.hypot(u - at[0], v - at[1])
        layers += [(painting.step(0.07 - away, unit), (255, 255, 255)), (painting.step(0.042 - away, unit), (0, 0, 0))]
    for alpha, rgb in layers:
        surface = surface * (1 - alpha) + np.float32(rgb) * alpha
    picture = (picture * (1 - coverage) + surface * coverage) * np.float32(rng.uniform(0.97, 1.02))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8), (coverage[..., 0] * 255 + 0.5).astype(np.uint8)


def caption(idn: Identity, background: str, words: tuple[str, ...] = MAIN_WORDS) -> str:
    """Describe a scene; `words` names the attributes to mention (see ALL_WORDS), the class always is."""
    noun = [getattr(idn, name) for name in ("tone", "color", "texture") if name in words]
    text = " ".join([word for word in noun if word] + [idn.cls])
    text = f"a photo of {'an' if text[0] in 'aeiou' else 'a'} {text}"
    details = []
    if idn.texture != "plain" and ("pattern" in words or "angle" in words):
        pattern = [idn.pattern_color if "pattern" in words else "", idn.angle if "angle" in words else ""]
        details.append(" ".join([word for word in pattern if word] + [PATTERN_NOUNS[idn.texture]]))
    if idn.emblem_shape and "emblem" in words:
        emblem = [
            idn.emblem_color if "emblem_color" in words else "",
            idn.emblem_shape if "emblem_shape" in words else "",
        ]
        details.append(
            " ".join(["a"] + [word for word in emblem if word] + ["emblem"]).replace("a emblem", "an emblem")
        )
    if details:
        text += " with " + " and ".join(details)
    return f"{text} {BACKGROUNDS[background]}" if "background" in words else text


def training_words(rng: np.random.Generator) -> tuple[str, ...]:
    """Which attributes a training caption mentions: sometimes none, sometimes only the background, often most."""
    kind = rng.random()
    if kind < 0.06:
        return ()
    if kind < 0.12:
        return ("background",)
    if kind < 0.3:
        return ALL_WORDS
    if kind < 0.45:
        return MAIN_WORDS
    return tuple(word for word in ALL_WORDS if rng.random() < 0.72)


@dataclass(frozen=True)
class Scene:
    """One rendered and captioned scene: image uint8 [96, 96, 3], mask uint8 [96, 96]."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    identity: Identity
    background: str


def scene(seed: int, from_held_out: bool = False) -> Scene:
    """The captioned scene of `seed`, from the training combinations or from the held-out ones."""
    rng = np.random.default_rng([4, int(from_held_out), seed])
    while True:
        idn = identity(int(rng.integers(2**31)))
        background = str(rng.choice(list(BACKGROUNDS)))
        if held_out(idn.cls, idn.color, idn.texture, background) == from_held_out:
            break
    image, mask = render(idn, background, int(rng.integers(2**31)))
    return Scene(image, mask, caption(idn, background, training_words(rng)), idn, background)
