"""Inputs that several nodes declare."""

from collections.abc import Iterable
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


def fraction(name: str, default: float, tooltip: str, **more: Any) -> io.Input:
    """An input from 0 to 1: a fraction, or a point in the schedule. more: another step, round or limit."""
    limits: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.0001, **more}
    return io.Float.Input(name, default=default, tooltip=tooltip, **limits)


def count(name: str, default: int, most: int, tooltip: str, **more: Any) -> io.Input:
    """A whole number from 1 to `most`. more: another minimum or step."""
    limits: dict[str, Any] = {"min": 1, "max": most, **more}
    return io.Int.Input(name, default=default, tooltip=tooltip, **limits)


def seed(tooltip: str, default: int = 0) -> io.Input:
    """A seed. Its range leaves headroom, since newer ComfyUI samplers add to it."""
    return io.Int.Input("seed", default=default, min=0, max=2**63 - 1, control_after_generate=True, tooltip=tooltip)


def cfg(default: float, tooltip: str, least: float = 1.0) -> io.Input:
    return io.Float.Input("cfg", default=default, min=least, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def rate(default: float, tooltip: str, **more: float) -> io.Input:
    """The learning rate. more: another step, round or minimum."""
    return fraction("learning_rate", default, tooltip, **{"min": 1e-9, "step": 1e-4, "round": 1e-6, **more})


def inner_steps(default: int, tooltip: str, least: int = 1) -> io.Input:
    return io.Int.Input("inner_steps", default=default, min=least, max=1000, tooltip=tooltip)


def side(tooltip: str) -> io.Input:
    return io.Int.Input("size", default=512, min=64, max=2048, step=8, tooltip=tooltip)


def split_ratio(most: float, tooltip: str) -> io.Input:
    """The last part of the steps, in which EZIGen's adapter is active."""
    return fraction("split_ratio", SPLIT_RATIO, tooltip, min=0.01, max=most, step=0.05, round=0.001)


def preset(tooltip: str) -> io.Input:
    """Settings that take the place of those on the node; tooltip: what each of them is."""
    first = "Settings that take the place of those above; the log says which. as set: none. "
    return choice("preset", presets.NAMES, first + tooltip, optional=True)


def saved_step(tooltip: str) -> io.Input:
    return io.Int.Input("step", default=0, min=0, max=100_000, tooltip=tooltip)


def scale(default: float, tooltip: str) -> io.Input:
    return io.Float.Input("scale", default=default, min=0.0, max=4.0, step=0.01, tooltip=tooltip)


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
        optional=True,
    )


def encoded_or_image() -> list[io.Input]:
    """The three inputs of an ImageSource: a latent, or an image with the VAE that encodes it."""
    return [
        io.Latent.Input("latent", optional=True, tooltip="The encoded image. Use this or image and VAE."),
        io.Image.Input("image", optional=True, tooltip="The image to encode. Needs the VAE."),
        io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
    ]
