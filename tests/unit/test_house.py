"""The rules of the house, read from the source: who may import whom, and how large a thing may become.

    python -m pytest tests/unit/test_house.py

needs neither ComfyUI nor a model. docs/architecture.md explains the rooms.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHODS = {"embedding", "sine", "siso", "ezigen", "inversion", "attention", "reference", "sana"}
SHARED = {"prompt", "fit", "lora", "session", "vision"}
COMFY = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8

CIRCLES: set[str] = set()
"""Modules of core that import each other in a circle. Take a module off this list when its circle is gone."""
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS: set[str] = {  # ComfyUI calls these, with as many
    "core/sine/host/guidance.py _Sampling.__call__",
}
"""Functions of core beyond a limit. Take one off when it is within the limit; add none."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def core_files() -> list[Path]:
    return sorted((ROOT / "core").rglob("*.py"))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, lazy: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports; lazy: also inside of functions.

    A relative import becomes a name that begins with "core" or "nodes", so that `core.nodes` is not ComfyUI's `nodes`.
    """
    for node in nodes_of(tree(path), lazy):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level]
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def nodes_of(parent: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(parent):
        yield node
        if lazy or not isinstance(node, Function):
            yield from nodes_of(node, lazy)


def may_import_comfy(path: Path) -> bool:
    parts = path.relative_to(ROOT / "core").parts
    return "host" in parts[:-1] or parts[0] == "session"


def test_only_host_folders_and_the_session_import_comfy():
    wrong = [
        f"{short(path)}:{line} imports {name}"
        for path in core_files()
        if not may_import_comfy(path)
        for line, name in imports(path, lazy=True)
        if name.split(".")[0] in COMFY
    ]
    assert not wrong, (
        "Only core/*/host/ and core/session/ may import ComfyUI; move the ComfyUI side there:\n" + "\n".join(wrong)
    )


def test_nodes_import_of_comfyui_nothing_but_its_node_interface():
    wrong = [
        f"{short(path)}:{line} imports {name}"
        for path in sorted((ROOT / "nodes").glob("*.py"))
        for line, name in imports(path, lazy=True)
        if name.split(".")[0] in COMFY - {"comfy_api"} and not name.startswith("nodes.")
    ]
    assert not wrong, "A node declares and unpacks; the work belongs into a host file:\n" + "\n".join(wrong)


def test_shared_rooms_know_no_method():
    shared = [path for path in core_files() if path.relative_to(ROOT / "core").parts[0] not in METHODS]
    wrong = [
        f"{short(path)}:{line} imports {name}"
        for path in shared
        for line, name in imports(path, lazy=True)
        if name.split(".")[0] == "core" and name.split(".")[1] in METHODS
    ]
    assert not wrong, "A shared room imports no method; let the method hand over what is needed:\n" + "\n".join(wrong)


def test_every_room_is_a_method_or_shared():
    rooms = {path.name for path in (ROOT / "core").iterdir() if (path / "__init__.py").is_file()}
    assert rooms - {"host"} == METHODS | SHARED


def exactly(offenders: set[str], known: set[str], what: str) -> None:
    """The list of known exceptions may only shrink: one that is mended is taken off it."""
    assert not offenders - known, f"These {what}: {sorted(offenders - known)}"
    assert not known - offenders, f"Mended; take these off the list in this file: {sorted(known - offenders)}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def graph() -> dict[str, set[str]]:
    """Which modules of core each module imports when it is loaded, or for its types."""
    paths = {module_name(path): path for path in core_files()}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = [name for _, name in imports(path, lazy=False)]
        # `from ..fit import runs` names a module, `from ..fit.runs import digest` something inside of one.
        targets = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = (targets & paths.keys()) - {module}
    return found


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph()[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph()[module])
    return seen


def test_no_import_circle():
    assert len(graph()) > 100 and "core.fit.fit" in reachable("core.embedding.host.train")
    in_a_circle = {module for module in graph() if module in reachable(module)}
    exactly(in_a_circle, CIRCLES, "modules import each other in a circle")


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of core with its place: file and dotted name."""

    def inside(parent: ast.AST, before: str) -> Iterator[tuple[str, Function]]:
        for node in ast.iter_child_nodes(parent):
            name = before
            if isinstance(node, (*Function.__args__, ast.ClassDef)):
                name = f"{before}.{node.name}".removeprefix(".")
            if isinstance(node, Function):
                yield name, node
            yield from inside(node, name)

    for path in core_files():
        yield from ((f"{short(path)} {name}", node) for name, node in inside(tree(path), ""))


def parameters(function: Function) -> int:
    """How many a caller can give; self and cls are not counted."""
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if positional[:1] in (["self"], ["cls"]):
        del positional[0]
    return len(positional) + len(arguments.kwonlyargs) + sum(map(bool, (arguments.vararg, arguments.kwarg)))


def lines(function: Function) -> int:
    """From `def` to the last line, docstring included."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_no_word_that_scanners_of_node_packs_take_for_running_code():
    """They look for the letters, also at the end of a name."""
    for path in (*core_files(), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"):
        words = r"(eval|exec|compile|__import__)\(|importlib\.import_module|subprocess\."
        assert not re.search(words, path.read_text(encoding="utf-8")), short(path)


def test_no_file_is_too_long():
    long = {short(path) for path in core_files() if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES}
    exactly(long, LONG_FILES, f"files have more than {FILE_LINES} lines")


def test_no_function_is_too_long():
    long = {name for name, function in functions() if lines(function) > FUNCTION_LINES}
    exactly(long, LONG_FUNCTIONS, f"functions have more than {FUNCTION_LINES} lines")


def test_no_function_has_too_many_parameters():
    many = {name for name, function in functions() if parameters(function) > PARAMETERS}
    exactly(many, MANY_PARAMETERS, f"functions have more than {PARAMETERS} parameters")


@pytest.mark.parametrize(
    ("source", "count"), [("def f(self, a, *, b): 0", 2), ("def f(a, /, b, *c, **d): 0", 4), ("def f(): 0", 0)]
)
def test_what_counts_as_a_parameter(source, count):
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef) and parameters(function) == count
