"""Which entries of a sampling belong to which prompt."""

from __future__ import annotations

import uuid
from typing import Any


def own_entries(guider: Any) -> dict[str, list[dict[str, Any]]]:
    """A running guider's prompts by name, each with the entries that were connected to it.

    For an area of one prompt ComfyUI puts a copy into every other one: with that prompt's rows, but with the id and the
    options of the first. The copies are left out here, and get ids of their own, so that an id says which prompt is
    evaluated. The entries belong to the run.
    """
    ids = {name: {entry["uuid"] for entry in entries or []} for name, entries in guider.original_conds.items()}
    connected = set().union(*ids.values())
    found: dict[str, list[dict[str, Any]]] = {}
    for name, entries in guider.conds.items():
        found[name] = [entry for entry in entries or [] if entry["uuid"] in ids.get(name, ())]
        for entry in entries or []:
            if entry["uuid"] in connected.difference(ids.get(name, ())):
                entry["uuid"] = uuid.uuid4()
    return found
