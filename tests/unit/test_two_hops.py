"""From a node to its equation in two hops: the table of docs/architecture.md is followed through the imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .test_methods_pages import lines_of

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(
    r"\| \[`(?P<node>\w+)`\]\(\.\./(?P<file>nodes/\w+\.py)#L(?P<at>\d+)\) "
    r"\| \[[^]]+\]\(\.\./(?P<host>core/\w+/host/\w+\.py)\) "
    r"\| \[`(?P<name>[\w.]+)`\]\(\.\./(?P<mathematics>core/\w+/\w+\.py)#L(?P<line>\d+)\) \|"
)
ROWS = [match.groupdict() for match in ROW.finditer((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))]
ROOMS = ("embedding", "sine", "siso", "ezigen", "inversion", "attention", "reference")


def imported(path: Path) -> set[Path]:
    """The files of the pack that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found |= {folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)}
    return found


def test_every_method_room_is_in_the_table():
    assert {row["host"].split("/")[1] for row in ROWS} >= set(ROOMS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["node"])
def test_two_hops_lead_to_the_equation(row):
    node, host, mathematics = (ROOT / row[part] for part in ("file", "host", "mathematics"))
    assert lines_of(node)[row["node"]] == int(row["at"])
    assert host in imported(node) and mathematics in imported(host)
    assert row["host"].split("/")[1] == row["mathematics"].split("/")[1], "the room changes on the way"
    assert lines_of(mathematics)[row["name"]] == int(row["line"])
