"""The pages of docs/methods: an equation leads to the line of its function, and every file of a room is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#]+\.py)#L(\d+)\)")


def lines_of(path: Path) -> dict[str, int]:
    """The line at which each function and class begins, by name; methods as Class.method."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{part.name}": part.lineno for part in node.body if isinstance(part, ast.FunctionDef)
            }
    return found


def test_every_method_room_has_a_page():
    rooms = {path.parent.name for path in (ROOT / "core").glob("*/host")} - {"prompt", "lora"}
    assert {page.stem for page in PAGES} == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_equations_lead_to_their_lines(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert links
    for name, target, line in links:
        path = (page.parent / target).resolve()
        assert path.is_file(), target
        assert lines_of(path).get(name) == int(line), f"{target}: {name} begins at line {lines_of(path).get(name)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_of_the_room_is_on_its_page(page):
    text = page.read_text(encoding="utf-8")
    files = [path.name for path in (ROOT / "core" / page.stem).glob("*.py") if path.name != "__init__.py"]
    assert not [name for name in files if f"core/{page.stem}/{name}" not in text]
