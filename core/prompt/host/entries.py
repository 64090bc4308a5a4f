"""The conditioning entries of a running sampling, by prompt."""

import uuid
from typing import Any

OPTION_PREFIX = "likeness."  # name prefix of the pack's options of a prompt


def entries_by_prompt(guider: Any) -> dict[str, list[dict[str, Any]]]:
    """A running guider's prompts by name, each with the entries that are evaluated for it.

    When one prompt has an area, ComfyUI adds a copy to every other prompt, with the other prompt's token embeddings but
    the id and options of the original. Here such a copy gets a new id, so that an id identifies the prompt, and the
    pack's options of the entry whose token embeddings it has. The entries are changed in place; they belong to the run.
    """
    ids = {name: {entry["uuid"] for entry in entries or []} for name, entries in guider.original_conds.items()}
    all_ids = set().union(*ids.values())
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for name, entries in guider.conds.items():
        by_prompt[name] = entries = entries or []
        originals = [entry for entry in entries if entry["uuid"] in ids.get(name, ())]
        for entry in entries:
            if entry["uuid"] in all_ids.difference(ids.get(name, ())):
                entry["uuid"] = uuid.uuid4()
                source = next((each for each in originals if table_of(each) is table_of(entry)), {})
                for option in [option for option in entry if option.startswith(OPTION_PREFIX)]:
                    del entry[option]
                entry |= {option: value for option, value in source.items() if option.startswith(OPTION_PREFIX)}
    return by_prompt


def table_of(entry: dict[str, Any]) -> Any:
    """The token embeddings that an entry is evaluated with, wrapped by ComfyUI, or None. A copy's "cross_attn" is not
    them: it comes from the prompt whose area the copy has."""
    return entry.get("model_conds", {}).get("c_crossattn")
