"""Every input of every node refuses every malformed form of its type with a sentence of the pack's own, before work."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from .. import inprocess
from .forms import WELL_FORMED, malformed

inprocess.start()
from likeness.core.session import inputs as checks  # noqa: E402
from likeness.nodes import LikenessExtension  # noqa: E402

NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(LikenessExtension().get_node_list())}
ROOT = Path(__file__).parents[2]
SECONDS = 2.0  # of one pair, on a loaded machine; they take less than a thousandth
ROOM = 16 << 20  # bytes that the process may have grown by: the longest text of the table has one megabyte


def well_formed(widget: Any) -> Any:
    """What passes the checks of this input, no more."""
    kind = widget.get_io_type()
    if kind in WELL_FORMED:
        return WELL_FORMED[kind]
    if kind in ("INT", "FLOAT"):
        return widget.min if getattr(widget, "min", None) is not None else 1
    if kind == "COMBO":
        return widget.options[0] if widget.options else "a name"
    return [] if kind == "LIKENESS_SUBJECTS" else SimpleNamespace(**dict.fromkeys(checks._OBJECTS[kind]))


def pairs(node: Any) -> list[tuple[str, str, Any]]:
    """(input, form, value)."""
    found = []
    for widget in node.GET_SCHEMA().inputs:
        options = vars(widget)
        listed = isinstance(options.get("options"), checks.Names)
        for form, value in malformed(widget.get_io_type(), options):
            file = listed and isinstance(value, str)  # of that name: looked for when the node runs
            if not file and not (value is None and widget.optional):
                found.append((widget.id, form, value))
    return found


def test_the_table_is_large():
    assert len(NODES) == 39 and sum(len(pairs(node)) for node in NODES.values()) > 2000


def refusals(name: str, slowest: list[float] | None = None, most: int | None = None) -> list[str]:
    """What is wrong with the answers to every malformed input of a node, or so many. slowest: gets the seconds."""
    node, schema = NODES[name].PREPARE_CLASS_CLONE({}), NODES[name].GET_SCHEMA()
    usual = {widget.id: well_formed(widget) for widget in schema.inputs}
    usual = {key: [value] for key, value in usual.items()} if schema.is_input_list else usual
    bad = []
    for entry, form, value in pairs(NODES[name])[:most]:
        given = {entry: [value] if schema.is_input_list else value}
        others = {key: each for key, each in usual.items() if key != entry}
        begin = time.monotonic()
        try:
            if "check_lazy_status" in vars(NODES[name]):  # as ComfyUI does, before what is lazy has run
                lazy = {widget.id: None for widget in schema.inputs if getattr(widget, "lazy", None)}
                node.check_lazy_status(**{**others, **given, **lazy})
            node.execute(**given, **others)
            bad.append(f"{entry}, {form}: accepted")
        except ValueError as error:
            own = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ROOT)
            text = str(error)
            if not own or entry not in text or "expected" not in text or ": " not in text or not text.isascii():
                bad.append(f"{entry}, {form}: {text}")
        except Exception as error:
            bad.append(f"{entry}, {form}: {type(error).__name__}: {error}")
        if slowest is not None:
            slowest.append(time.monotonic() - begin)
    return bad


@pytest.mark.parametrize("name", NODES)
def test_every_malformed_input_is_refused_with_a_sentence(name):
    bad = refusals(name)
    assert not bad, "\n".join(bad)


class Changes:
    """Every change of the file system by this process, while `on`: a hook of Python's audit cannot be removed."""

    EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.move")
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self.on, self.found = False, list[tuple[Any, ...]]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in self.EVENTS or (event == "open" and (arguments[2] or 0) & self.WRITING)):
            self.found.append((event, *map(str, arguments)))


def test_the_whole_table_leaves_no_file_and_no_memory_and_never_hangs():
    changes, seconds = Changes(), list[float]()
    for name in NODES:  # what is made once, such as the nodes' schemas
        refusals(name, most=3)
    gc.collect()
    memory, tensors = psutil.Process().memory_info().rss, alive()
    changes.on = True
    try:
        assert not any(refusals(name, seconds) for name in NODES)
    finally:
        changes.on = False
    gc.collect()
    assert changes.found == [], "a refused input reaches no file, in no folder, not even a temporary one"
    assert alive() == tensors
    assert psutil.Process().memory_info().rss - memory < ROOM
    assert len(seconds) > 2000 and max(seconds) < SECONDS


def alive() -> int:
    """The tensors that Python holds."""
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
