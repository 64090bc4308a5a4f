"""Every node of the pack, with the inputs that it has in a shipped graph."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from likeness.toolbox.graph import active_nodes
from likeness.toyworld import workflows

from .. import live
from ..executor import executor
from ..server.results import Results


def own_nodes() -> dict[str, Any]:
    import nodes

    return {name: each for name, each in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Likeness")}


class Recorded:
    """The inputs with which nodes were executed in shipped graphs with few steps."""

    def __init__(self, server: Any) -> None:
        self.inputs, self._results = dict[str, dict[str, Any]](), Results(server)

    def run(self, name: str) -> None:
        """Run a shipped graph, and note what each of our nodes gets."""
        with pytest.MonkeyPatch.context() as patch:
            for identity, node in own_nodes().items():
                patch.setattr(node, "execute", classmethod(self._noting(identity, node.execute.__func__)))
            assert self._results[name].run.status == "execution_success"

    def _noting(self, identity: str, execute: Any) -> Any:
        @functools.wraps(execute)
        def run(cls: type, **inputs: Any) -> Any:
            self.inputs[identity] = inputs
            return execute(cls, **inputs)

        return run

    def call(self, identity: str, **changed: Any) -> Any:
        """Execute a node alone with some inputs changed."""
        node = own_nodes()[identity].PREPARE_CLASS_CLONE({})
        return node.execute(**{**self.inputs[identity], **changed})


def graphs_of_all_nodes() -> dict[str, str]:
    """A shipped graph for each node: those with few nodes first."""
    graphs = {name: workflows.shipped(name) for name in live.NAMES}
    found: dict[str, str] = {}
    for name in sorted(graphs, key=lambda name: len(graphs[name]["nodes"])):
        for node in active_nodes(graphs[name]):
            if node["type"].startswith("Likeness"):
                found.setdefault(node["type"], name)
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with executor(tmp_path_factory.mktemp("comfyui")) as running:
        yield running
