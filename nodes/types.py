"""The pack's own types, and schemas that load on ComfyUI 0.3.75 and later."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..core.lora.low_rank import ATTENTION, LAYERS

Adapter = io.Custom("LIKENESS_ADAPTER")
Embedding = io.Custom("LIKENESS_EMBEDDING")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
Similarity = io.Custom("LIKENESS_SIMILARITY")
Subject = io.Custom("LIKENESS_SUBJECT")
Subjects = io.Custom("LIKENESS_SUBJECTS")
Trajectory = io.Custom("LIKENESS_TRAJECTORY")

TYPED = ("one image", "dreambooth", "face", "character", "ip-adapter")  # common search terms
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """An io.Schema with the aliases that all nodes share. Fields unknown to this ComfyUI (search_aliases before 0.11)
    are left out.
    """
    fields["search_aliases"] = [*fields["search_aliases"], *TYPED]
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def advanced(*widgets: io.Input) -> list[io.Input]:
    """Mark inputs as advanced: newer frontends collapse them, older ones ignore the flag."""
    for widget in widgets:
        widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return list(widgets)


def fraction(name: str, default: float, tooltip: str) -> io.Input:
    """An input from 0 to 1: a fraction, or a point in the schedule."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip)


def cfg_input(default: float, tooltip: str) -> io.Input:
    """The input of a guidance scale."""
    return io.Float.Input("cfg", default=default, min=1.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def encoded_or_image() -> list[io.Input]:
    """The three inputs of an ImageSource: a latent, or an image with the VAE that encodes it."""
    return [
        io.Latent.Input("latent", optional=True, tooltip="The encoded image. Use this or image and VAE."),
        io.Image.Input("image", optional=True, tooltip="The image to encode. Needs the VAE."),
        io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
    ]


def layers_input(attention: str) -> io.Input:
    """Which layers get a LoRA; attention: what that choice covers."""
    return io.Combo.Input(
        "layers",
        options=list(LAYERS),
        default=ATTENTION,
        optional=True,
        tooltip=f"Which layers get the LoRA: {attention}, or all linear layers of the model's blocks. All of them hold "
        "more of the subject and take more memory.",
    )


def seed_input(tooltip: str, default: int = 0) -> io.Input:
    """The input of a seed. Its range leaves headroom, since newer ComfyUI samplers add to it."""
    return io.Int.Input("seed", default=default, min=0, max=2**63 - 1, control_after_generate=True, tooltip=tooltip)
