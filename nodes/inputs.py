"""Inputs that several nodes declare."""

from collections.abc import Iterable, Sequence
from typing import Any

from comfy_api.latest import io

from ..core.ezigen.staged import SPLIT_RATIO
from ..core.fit import presets
from ..core.lora.low_rank import LAYERS


def advanced(*widgets: io.Input) -> list[io.Input]:
    """Mark inputs as advanced: newer frontends collapse them, older ones ignore the flag."""
    for widget in widgets:
        widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return list(widgets)


def choice(name: str, options: Iterable[str], tooltip: str, **more: Any) -> io.Input:
    """One of some words, by default the first."""
    words = list(options)
    more.setdefault("default", words[0])
    return io.Combo.Input(name, options=words, tooltip=tooltip, **more)


def number(name: str, default: float, limits: Sequence[float], tooltip: str, **more: Any) -> io.Input:
    """A number, a whole one where its default is. limits: the least and the greatest value, the step, and what the
    page rounds it to, the last two if there are any.
    """
    kind: Any = io.Int if isinstance(default, int) else io.Float
    named = dict(zip(("min", "max", "step", "round"), limits, strict=False))
    return kind.Input(name, default=default, tooltip=tooltip, **named, **more)


def fraction(name: str, default: float, tooltip: str) -> io.Input:
    """An input from 0 to 1: a fraction, or a point in the schedule."""
    return number(name, default, (0.0, 1.0, 0.01, 0.0001), tooltip)


def count(name: str, default: int, most: int, tooltip: str) -> io.Input:
    """A whole number from 1 to `most`."""
    return number(name, default, (1, most), tooltip)


def seed(tooltip: str, default: int = 0) -> io.Input:
    """A seed. Its range leaves headroom, since newer ComfyUI samplers add to it."""
    return io.Int.Input("seed", default=default, min=0, max=2**63 - 1, control_after_generate=True, tooltip=tooltip)


def cfg(default: float, tooltip: str, least: float = 1.0) -> io.Input:
    return number("cfg", default, (least, 100.0, 0.1, 0.01), tooltip)


def token_rate(default: float, tooltip: str, step: float = 1e-4) -> io.Input:
    """The learning rate of a prompt's tokens, whose numbers are large with some text encoders."""
    return number("learning_rate", default, (1e-9, 100.0, step, 1e-6), tooltip)


def inner_steps(default: int, tooltip: str, least: int = 1) -> io.Input:
    return number("inner_steps", default, (least, 1000), tooltip)


def side(tooltip: str) -> io.Input:
    return number("size", 512, (64, 2048, 8), tooltip)


def split_ratio(most: float, tooltip: str) -> io.Input:
    """The last part of the steps, in which EZIGen's adapter is active."""
    return number("split_ratio", SPLIT_RATIO, (0.01, most, 0.05, 0.001), tooltip)


def preset(tooltip: str) -> io.Input:
    """Settings that take the place of those on the node; tooltip: what each of them is."""
    first = "Settings that take the place of those above; the log says which. as set: none. "
    return choice("preset", presets.NAMES, first + tooltip)


def saved_step(tooltip: str) -> io.Input:
    return number("step", 0, (0, 100_000), tooltip)


def scale(default: float, tooltip: str) -> io.Input:
    return number("scale", default, (0.0, 4.0, 0.01), tooltip)


def prefix(default: str) -> io.Input:
    tooltip = "File name, optionally with subfolders. A number is appended, so nothing is overwritten."
    return io.String.Input("filename_prefix", default=default, tooltip=tooltip)


def checkpointing() -> io.Input:
    cost = "recomputes activations instead of storing them. Less VRAM, more time, the same result."
    return io.Boolean.Input("checkpointing", default=False, tooltip=f"Gradient checkpointing: {cost}")


def layers(attention: str) -> io.Input:
    """Which layers get a LoRA; attention: what that choice covers."""
    return choice(
        "layers",
        LAYERS,
        f"Which layers get the LoRA: {attention}, or all linear layers of the model's blocks. All of them hold more of "
        "the subject and take more memory.",
    )


def encoded_or_image() -> list[io.Input]:
    """The three inputs of an ImageSource: a latent, or an image with the VAE that encodes it."""
    return [
        io.Latent.Input("latent", tooltip="The encoded image. Use this or image and VAE."),
        io.Image.Input("image", tooltip="The image to encode. Needs the VAE."),
        io.Vae.Input("vae", tooltip="Encodes the image."),
    ]
