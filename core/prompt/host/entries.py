"""Which entries of a sampling belong to which prompt."""

from __future__ import annotations

import uuid
from typing import Any

OURS = "likeness."  # how the names of our options of a prompt begin


def own_entries(guider: Any) -> dict[str, list[dict[str, Any]]]:
    """A running guider's prompts by name, each with the entries that are evaluated for it.

    For an area of one prompt ComfyUI puts a copy into every other one: with that prompt's rows, but with the id and the
    options of the first. Such a copy gets an id of its own here, so that an id says which prompt is evaluated, and our
    options from the entry whose rows it has. The entries belong to the run.
    """
    ids = {name: {entry["uuid"] for entry in entries or []} for name, entries in guider.original_conds.items()}
    connected = set().union(*ids.values())
    found: dict[str, list[dict[str, Any]]] = {}
    for name, entries in guider.conds.items():
        found[name] = entries = entries or []
        own = [entry for entry in entries if entry["uuid"] in ids.get(name, ())]
        for entry in entries:
            if entry["uuid"] in connected.difference(ids.get(name, ())):
                entry["uuid"] = uuid.uuid4()
                _take_options(entry, next((each for each in own if table_of(each) is table_of(entry)), {}))
    return found


def table_of(entry: dict[str, Any]) -> Any:
    """The rows that an entry is evaluated with, wrapped by ComfyUI, or None. The "cross_attn" of a copy is that of the
    prompt whose area it has."""
    return entry.get("model_conds", {}).get("c_crossattn")


def _take_options(entry: dict[str, Any], source: dict[str, Any]) -> None:
    for name in [name for name in entry if name.startswith(OURS)]:
        del entry[name]
    entry |= {name: value for name, value in source.items() if name.startswith(OURS)}
