"""The tables of the trials through a real server: each row gets a result or a sentence, and the worker lives on.

Its console is that of a Windows of another alphabet; what it cannot write ends the worker.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from likeness.toolbox.graph import active_nodes, convert, with_ancestors
from likeness.toolbox.server import PromptError, Server, environment_from_variables
from likeness.toyworld import workflows

from .. import live
from ..server.results import Results
from .conftest import graphs_of_all_nodes
from .forms import BY_TYPE, OBJECTS, TEXTS, UNFIT
from .test_malformed import NODES, WELL_FORMED, pairs, well_formed
from .test_unfit import PLAYED, optional_image

pytestmark = pytest.mark.slow
GRAPHS = graphs_of_all_nodes()
PACK = str(Path(__file__).parents[2])
SAVED = ("output", "temp", "user", "models/likeness_embeddings", "models/likeness_adapters", "models/loras", "input")
TIMEOUT = 300.0  # seconds of one prompt
CONVERTED = ("BOOLEAN", "STRING")  # of any value of a prompt, by ComfyUI
ASKED = re.compile(r"invalid_input_type|value_(smaller|bigger)_than_\w+|value_not_in_list|bad_linked_input")
"""Refusals of ComfyUI's own that name the input."""


class Rows:
    """Sends rows to the server and counts the answers."""

    def __init__(self, server: Server) -> None:
        self.server, self.results = server, Results(server)
        self.counts = {"result": 0, "sentence": 0, "ComfyUI's own": 0}

    def send(self, prompt: dict[str, Any]) -> str | None:
        """What is wrong with the answer; None when it is a result or a sentence."""
        try:
            assert self.server.run(prompt, timeout=TIMEOUT).status == "execution_success"
        except PromptError as error:
            return self._judge(error)
        self.counts["result"] += 1
        return None

    def _judge(self, error: PromptError) -> str | None:
        text, data = str(error), error.data
        if "exception_type" in data:
            own = PACK in data["traceback"][-1] or "/ComfyUI-Likeness/" in data["traceback"][-1]
            kinds = ("ValueError", "RuntimeError", "FileNotFoundError")
            sentence = own and data["exception_type"] in kinds and (": " in text or "; " in text) and text.isascii()
            self.counts["sentence"] += sentence
            return None if sentence else f"{data['exception_type']}: {ascii(text)[:300]}"
        problems = [each for node in data["node_errors"].values() for each in node["errors"]]
        own = [each["type"] == "custom_validation_failed" and " - " in each["details"] for each in problems]
        self.counts["sentence" if any(own) else "ComfyUI's own"] += 1
        said = [mine or ASKED.fullmatch(each["type"]) for mine, each in zip(own, problems, strict=True)]
        return None if problems and all(said) else f"refused: {ascii(str(problems))[:300]}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Iterator[Rows]:
    """One server for all; it must be as before at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONIOENCODING", "cp1252:strict")
        base = tmp_path_factory.mktemp("http") / "comfyui"
        folders = {**workflows.NODE_FOLDERS, "trials": Path(__file__).parent / "comfyui_nodes"}
        with Server(environment_from_variables(), base, folders, workflows.MODELS) as server:
            live.draw(base / "input")
            found = Rows(server)
            found.results["9 Lab - SISO - Sana"]  # also writes its models
            before, memory = files(base), freed(server)
            yield found
            server.wait_idle()
            assert found.results["9 Lab - Inversion - invert and edit"].run.status == "execution_success", (
                "the worker is dead"
            )
            left = files(base) - before
            assert not [name for name in left if name.endswith(".tmp")], "a half-written file"
            assert not [name for name in left if not name.startswith(SAVED)], "a file outside of its folder"
            assert list(base.parent.iterdir()) == [base], "a file outside of all folders"
            assert freed(server) - memory < 1 << 30


def freed(server: Server) -> int:
    """The server's memory once its models are unloaded and its results are forgotten."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    held = server.memory()
    for _ in range(20):  # it does so when it looks at its queue again
        time.sleep(0.25)
        held = min(held, server.memory())
    return held


def files(base: Path) -> set[str]:
    """All files below, without those behind links."""
    return {Path(folder, name).relative_to(base).as_posix() for folder, _, names in os.walk(base) for name in names}


def value(table: str, kind: str = "", form: str = "") -> dict[str, Any]:
    return {"class_type": "TrialValue", "inputs": {"table": table, "kind": kind, "form": form}}


def usual(widget: Any) -> dict[str, Any]:
    """What passes this input's checks."""
    given = well_formed(widget)
    if widget.get_io_type() in WELL_FORMED:
        return value("well formed", widget.get_io_type())
    is_object = hasattr(given, "__dict__")
    return value("object", form=" ".join(vars(given))) if is_object else value("json", form=json.dumps(given))


def malformed_prompts(identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the malformed table by a link, and what a prompt can hold also directly."""
    schema = NODES[identity].GET_SCHEMA()
    kinds = {widget.id: widget.get_io_type() for widget in schema.inputs}
    others = {f"a {widget.id}": usual(widget) for widget in schema.inputs if not widget.optional}
    links = {name[2:]: [name, 0] for name in others}
    last = {"show": {"class_type": "PreviewAny", "inputs": {"source": ["target", 0]}}}
    last = {} if schema.is_output_node else last
    for entry, form, given in pairs(NODES[identity]):
        kind = kinds[entry]
        table = value("malformed", kind, form)
        if form not in BY_TYPE.get(kind, OBJECTS):  # a number out of the range
            table = value("json", form=json.dumps(given))
        ways = {"by a link": ["row", 0]}
        if kind in ("INT", "FLOAT", "COMBO") and form != "half":
            ways["directly"] = given
        for way, put in ways.items():
            target = {"class_type": identity, "inputs": {**links, entry: put}}
            yield f"{entry}, {form}, {way}", {**others, "row": table, "target": target, **last}


@pytest.mark.parametrize("identity", NODES)
def test_every_malformed_input_is_refused(rows, identity, record_property):
    before = dict(rows.counts)
    answers = [(name, rows.send(prompt)) for name, prompt in malformed_prompts(identity)]
    bad = [f"{name}: {answer}" for name, answer in answers if answer]
    assert not bad, "\n".join(bad)
    assert rows.counts["result"] == before["result"], "accepted"
    record_property("counts", {name: count - before[name] for name, count in rows.counts.items()})


def unfit_prompts(rows: Rows, identity: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The node in a shipped graph with one input that does not fit, or an odd text."""
    graph, known = rows.results[GRAPHS[identity]].graph, rows.server.object_info()
    target = next(str(node["id"]) for node in active_nodes(graph) if node["type"] == identity)
    prompt = with_ancestors(convert(graph, known), [target])
    if not known[identity]["output_node"]:
        prompt["show"] = {"class_type": "PreviewAny", "inputs": {"source": [target, 0]}}
    tables = {"STRING": ("texts", TEXTS), "COMBO": ("texts", TEXTS)}
    tables |= {kind: ("unfit", forms) for kind, forms in UNFIT.items()}
    for widget in NODES[identity].GET_SCHEMA().inputs:
        kind = widget.get_io_type()
        table, forms = tables.get(kind, ("", {}))
        for form in forms:
            inputs = {**prompt[target]["inputs"], widget.id: ["row", 0]}
            if widget.id == "latent" and optional_image(NODES[identity]):
                inputs = {name: each for name, each in inputs.items() if name not in ("image", "vae")}
            row = {"row": value(table, kind, form), target: {**prompt[target], "inputs": inputs}}
            yield f"{widget.id}, {form}", {**prompt, **row}


@pytest.mark.parametrize("identity", [node for node in GRAPHS if node not in PLAYED])
def test_what_does_not_fit_gives_a_result_or_a_sentence(rows, identity, record_property):
    before = dict(rows.counts)
    answers = [(name, rows.send(prompt)) for name, prompt in unfit_prompts(rows, identity)]
    bad = [f"{name}: {answer}" for name, answer in answers if answer]
    assert not bad, "\n".join(bad)
    record_property("counts", {name: count - before[name] for name, count in rows.counts.items()})
