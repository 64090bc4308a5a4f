"""Well-formed values that do not fit, and odd texts, in every node with real models: a result or a sentence.

No text of a user, a file or a graph may stop the worker, whatever its console can write.
"""

from __future__ import annotations

import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from likeness.toyworld import workflows

from .conftest import Recorded, graphs_of_all_nodes, own_nodes
from .forms import TEXTS, UNFIT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
GRAPHS = graphs_of_all_nodes()
PLAYED = ("LikenessLoadSana", *workflows.PLAYED)  # by nodes of the toyworld, which has no such models


class Console(logging.StreamHandler):
    """A Windows console of another alphabet; what it cannot write ends the test, as it ends a worker."""

    def __init__(self) -> None:
        super().__init__(io.TextIOWrapper(io.BytesIO(), "cp1252", errors="strict"))

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802
        raise


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    handler, root = Console(), logging.getLogger()
    root.addHandler(handler)
    yield
    root.removeHandler(handler)


@pytest.fixture(scope="session")
def recorded(server) -> Recorded:
    """All graphs that a node is taken from, each run once."""
    found = Recorded(server)
    for name in dict.fromkeys(GRAPHS.values()):
        found.run(name)
    return found


def said(error: Exception) -> str | None:
    """What is wrong with an error that a user gets; None when it is a sentence of the pack's own."""
    frame = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    text = "".join(traceback.format_exception(error))
    own = frame.is_relative_to(ROOT) and isinstance(error, (ValueError, RuntimeError, FileNotFoundError))
    if own and (": " in str(error) or "; " in str(error)) and text.isascii():
        logging.getLogger().error(text)  # as ComfyUI does
        return None
    return f"{type(error).__name__}: {ascii(str(error))[:300]} in {frame.name}"


def optional_image(node: Any) -> bool:
    """Whether a node takes a latent or an image."""
    optional = {widget.id for widget in node.GET_SCHEMA().inputs if widget.optional}
    return {"latent", "image", "vae"} <= optional


def trials(node: str, forms: dict[str, dict[str, Any]], recorded: Recorded) -> list[str]:
    """What went wrong."""
    bad = []
    listed = own_nodes()[node].GET_SCHEMA().is_input_list
    for widget in own_nodes()[node].GET_SCHEMA().inputs:
        for form, value in forms.get(widget.get_io_type(), {}).items():
            try:
                others = (
                    dict.fromkeys(("image", "vae"))
                    if widget.id == "latent" and optional_image(own_nodes()[node])
                    else {}
                )
                with torch.inference_mode():
                    recorded.call(node, **others, **{widget.id: [value] if listed else value})
            except Exception as error:
                problem = said(error)
                bad += [f"{widget.id}, {form}: {problem}"] if problem else []
    return bad


@pytest.mark.parametrize("node", [node for node in GRAPHS if node not in PLAYED])
def test_what_does_not_fit_gives_a_result_or_a_sentence(recorded, node):
    bad = trials(node, UNFIT, recorded)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("node", [node for node in GRAPHS if node not in PLAYED])
def test_odd_texts_give_a_result_or_a_sentence(recorded, node):
    bad = trials(node, {"STRING": TEXTS, "COMBO": TEXTS}, recorded)
    assert not bad, "\n".join(bad)
