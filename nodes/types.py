"""The pack's own types, and schemas that load on every ComfyUI from 0.3.75 on."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

Adapter = io.Custom("LIKENESS_ADAPTER")
Embedding = io.Custom("LIKENESS_EMBEDDING")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
Similarity = io.Custom("LIKENESS_SIMILARITY")
Subject = io.Custom("LIKENESS_SUBJECT")
Subjects = io.Custom("LIKENESS_SUBJECTS")
Trajectory = io.Custom("LIKENESS_TRAJECTORY")

TYPED = ("one image", "dreambooth", "face", "character", "ip-adapter")  # what people look for this pack by
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """An io.Schema with the aliases that all nodes share; fields that this ComfyUI does not know yet (search_aliases
    before 0.11) are left out.
    """
    fields["search_aliases"] = [*fields["search_aliases"], *TYPED]
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def advanced(*widgets: io.Input) -> list[io.Input]:
    """Mark inputs as advanced: newer pages fold them away, older ones ignore the mark."""
    for widget in widgets:
        widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return list(widgets)


def fraction(name: str, default: float, tooltip: str) -> io.Input:
    """A number from 0 to 1: a share of something, or a place in the schedule."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, round=0.0001, tooltip=tooltip)


def cfg_input(default: float, tooltip: str) -> io.Input:
    """A guidance scale."""
    return io.Float.Input("cfg", default=default, min=1.0, max=100.0, step=0.1, round=0.01, tooltip=tooltip)


def encoded_or_image() -> list[io.Input]:
    """The three inputs of an ImageSource: a latent, or an image with the VAE that encodes it."""
    return [
        io.Latent.Input("latent", optional=True, tooltip="The image, encoded. Instead of image and VAE."),
        io.Image.Input("image", optional=True, tooltip="The image. Needs the VAE."),
        io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
    ]


def seed_input(tooltip: str, default: int = 0) -> io.Input:
    """A seed. Its range leaves room above: newer samplers of ComfyUI add to it."""
    return io.Int.Input("seed", default=default, min=0, max=2**63 - 1, control_after_generate=True, tooltip=tooltip)
