"""Presets: settings of a training that belong together, under one name.

A method's table has, by preset and by kind of model, the inputs that the preset sets; all others stay as they are on
the node: embedding/presets.py, siso/presets.py.
"""

import logging
from collections.abc import Mapping
from typing import Any

AS_SET, FAST, PUBLISHED = "as set", "fast", "published"
NAMES = (AS_SET, FAST, PUBLISHED)
NOISE, FLOW = "noise", "flow"  # kinds of models: noise is added to their latents, or takes the latents' place
log = logging.getLogger("likeness")

Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]


def settings_of(presets: Presets, name: str, kind: str) -> Mapping[str, Any]:
    """What a preset sets on models of this kind, or the nearest that it has."""
    kinds = presets.get(name, {})
    return kinds.get(kind) or next(iter(kinds.values()), {})


def apply_preset(presets: Presets, name: str, kind: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node with a preset's settings in their place; the log says which they are."""
    settings = settings_of(presets, name, kind)
    if settings:
        if kind not in presets[name]:
            log.warning("Preset '%s' was not measured on %s models: the nearest one is taken.", name, kind)
        log.info("Preset '%s' sets %s.", name, ", ".join(f"{key} {value}" for key, value in settings.items()))
    return {**inputs, **settings}
