"""The pack's own types, and schemas that load on ComfyUI 0.3.75 and later."""

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

TYPED = ("one image", "dreambooth", "face", "character", "ip-adapter")  # common search terms
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields: Any) -> io.Schema:
    """An io.Schema with the aliases that all nodes share. Fields unknown to this ComfyUI (search_aliases before 0.11)
    are left out.
    """
    fields["search_aliases"] = [*fields["search_aliases"], *TYPED]
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def output(kind: Any, name: str, tooltip: str, **more: Any) -> io.Output:
    return kind.Output(display_name=name, tooltip=tooltip, **more)
