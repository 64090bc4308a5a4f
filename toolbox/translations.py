"""Writes the English texts of the nodes: `python toolbox/translations.py` makes locales/en/nodeDefs.json anew.

Translations are written by hand; a test compares their entries with the English ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "Likeness"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"


def node_texts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the page may show of one node, in the shape of its translation files."""
    inputs = {}
    for section in ("required", "optional"):
        for name, spec in (info["input"].get(section) or {}).items():
            inputs[name] = {"name": name, "tooltip": spec[1]["tooltip"]}
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": text} for index, (name, text) in enumerate(outputs)},
    }


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The English texts of all nodes of the pack."""
    return {name: node_texts(info) for name, info in sorted(object_info.items()) if name.startswith(PREFIX)}


def main(arguments: list[str]) -> int:
    """Write the English file anew."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    from .environment import prepare
    from .server import Server

    with tempfile.TemporaryDirectory() as base, Server(prepare(browser=False), Path(base), {ROOT.name: ROOT}) as server:
        if server.import_failures():
            raise SystemExit(server.log()[-4000:])
        texts = english(server.object_info())
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(json.dumps(texts, indent=2) + "\n", encoding="utf-8")
    print(f"{ENGLISH.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    from _load import run  # ty: ignore[import-not-found] (this folder is on the path of a script)

    sys.exit(run("toolbox.translations", sys.argv[1:]))
