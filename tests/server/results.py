"""Finished runs of shipped graphs, and what is asked of their images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from likeness.toolbox.graph import active_nodes, convert
from likeness.toyworld import workflows

from .. import live, tiny_sana

UNWANTED = ("Traceback", "ERROR", "WARNING", "Warning", "deprecated", "lora key not loaded")
# A stock loader says of a file that was tuned on patches what it does not know.
SAID = "lora key not loaded: likeness.needs_position_map"
# A graph that learns and the one that loads what it saved, run as they are shipped.
STOCK = tuple(name for name in live.NAMES if name[0] in "18")


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


class Result:
    """A finished run of a shipped graph."""

    def __init__(self, server, graph, run, log: str) -> None:
        self._server, self.graph, self.run, self.log = server, graph, run, log

    def pictures(self, title: str) -> list[np.ndarray]:
        return [pixels(image) for image in self._server.images(self.run, workflows.node_id(self.graph, title))]

    def text(self, title: str) -> str:
        return "\n".join(self.run.outputs[workflows.node_id(self.graph, title)]["text"])


def check_images(pictures: list[np.ndarray], apart: float = 0.002) -> None:
    """Neither black nor flat, nor the subject's image itself, nor each other (mean distance of the pixels)."""
    for index, picture in enumerate(pictures):
        assert picture.shape == (workflows.SIZE, workflows.SIZE, 3)
        assert picture.std() > 0.03
        assert all(distance(picture, other) > apart for other in pictures[:index])


def run_graph(server, name: str, settings: dict[tuple[str, str], Any] | None = None) -> Result:
    """Run a shipped graph with few steps; every node that shows or saves something must have run."""
    before = len(server.log())
    object_info = server.object_info()  # anew: the choices now include what was saved
    graph = live.lowered(name, object_info, settings, stock=name in STOCK)
    # Other tests may have run the same nodes, and the run's events are looked at.
    run = server.run(live.anew(convert(graph, object_info)))
    outputs = {str(node["id"]) for node in active_nodes(graph) if object_info[node["type"]].get("output_node")}
    assert set(run.outputs) == outputs, "a part of the graph did not run"
    return Result(server, graph, run, server.log()[before:])


class Results(Mapping[str, Result]):
    """Runs of the shipped graphs, each made when it is first asked for, and whatever saves something for it before."""

    def __init__(self, server) -> None:
        self._server = server
        self._done: dict[str, Result] = {}

    def __getitem__(self, name: str) -> Result:
        if name not in self._done:
            self._done[name] = run_graph(self._server, name, self.choices(name))
        return self._done[name]

    def __iter__(self) -> Iterator[str]:
        return iter(live.NAMES)

    def __len__(self) -> int:
        return len(live.NAMES)

    def choices(self, name: str) -> dict[tuple[str, str], Any]:
        """The files that other graphs have saved for this one, and small models that only this server has."""
        found: dict[tuple[str, str], Any] = {}
        after = workflows.sidecar(name).get("after")
        if after:
            made = self[after["graph"]]
            if "saved by" in after:
                node, widget = after["chosen in"]
                found[node, widget] = made.text(after["saved by"]).splitlines()[0]
        if name == "9 Lab - SISO - Sana":
            found |= tiny_sana.in_server(self._server)
        return found
