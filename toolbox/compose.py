"""Writes the shipped graphs: `python toolbox/compose.py` makes workflows/*.json from what toolbox/shipped describes.

It starts a ComfyUI with the pack, because the nodes' inputs are taken from the server's own /object_info.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph, ObjectInfo

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"


def compose(name: str, object_info: ObjectInfo) -> Graph:
    """The shipped graph of this name."""
    from .drawing import Drawing
    from .shipped import GRAPHS

    drawing = Drawing(name, object_info)
    GRAPHS[name](drawing)
    return drawing.graph()


def main(arguments: list[str]) -> int:
    """Write all shipped graphs anew."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(arguments)
    from .environment import prepare
    from .server import Server
    from .shipped import GRAPHS

    with tempfile.TemporaryDirectory() as base, Server(prepare(browser=False), Path(base), {ROOT.name: ROOT}) as server:
        if server.import_failures():
            raise SystemExit(server.log()[-4000:])
        object_info = server.object_info()
    for name in GRAPHS:
        path = WORKFLOWS / f"{name}.json"
        path.write_text(json.dumps(compose(name, object_info), indent=1) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    from _load import run  # ty: ignore[import-not-found] (this folder is on the path of a script)

    sys.exit(run("toolbox.compose", sys.argv[1:]))
