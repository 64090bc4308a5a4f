"""A real ComfyUI with the pack and the small world, for the server and the browser tests."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toolbox.server import PromptRun, Server, environment_from_variables
from likeness.toyworld import workflows

NAMES = tuple(sorted(path.stem for path in workflows.WORKFLOWS.glob("*.json")))
PACK = next(iter(workflows.NODE_FOLDERS))
# The numbers of toyworld/graphs with which the tests run the graphs: of a training, and of a likeness optimisation.
STEPS, ITERATIONS = 10, 4
EXACT_STEPS = 5  # of a sampling, where more than three are needed


def start(base: Path, frontend: Path | None = None) -> Server:
    """A server that is not started yet. Fails loudly when the small world's models are not there."""
    if not (workflows.MODELS / "checkpoints" / workflows.CHECKPOINT).is_file():
        raise RuntimeError("The small world's models are missing: run the tests with `python3 toolbox/test.py`.")
    server = Server(environment_from_variables(), base, workflows.NODE_FOLDERS, workflows.MODELS, frontend)
    draw(base / "input")
    return server


def draw(folder: Path) -> None:
    """Write all images that graphs load."""
    picture = workflows.draw_subject(folder)
    shutil.copy(picture, picture.with_name("example.png"))  # what a shipped graph names; every ComfyUI brings one


def lowered(
    name: str, object_info: dict[str, Any], settings: dict[tuple[str, str], Any] | None = None, stock: bool = False
) -> dict[str, Any]:
    """A shipped graph in the toyworld with few steps. stock: with the loader that it is shipped with, of checkpoints
    of SD1.5's width; otherwise their function at 1/25 of the cost.
    """
    graph = workflows.in_small_world(name, object_info, quick=True, more=settings)
    return graph if stock else workflows.narrowed(graph)


def anew(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with every node of this pack executed, whatever ran before; loaded models stay where they are.

    ComfyUI's cache looks at all inputs, and hands a node only those that it has.
    """
    mark = {"executed": uuid.uuid4().hex}

    def own(node: dict[str, Any]) -> bool:
        return node["class_type"].startswith("Likeness") and not node["class_type"].startswith("LikenessLoad")

    return {
        name: {**node, "inputs": {**node["inputs"], **mark}} if own(node) else node for name, node in prompt.items()
    }


class Training:
    """The training part of the shipped graph, as prompts for the server."""

    def __init__(self, server: Server, object_info: dict[str, Any], stock: bool = False) -> None:
        self._server = server
        graph = lowered("9 Lab - HiPer - train and edit", object_info, stock=stock)
        self.node = workflows.node_id(graph, "Learn the subject")
        self.saver = workflows.node_id(graph, "Save the subject")
        self.loader = workflows.node_id(graph, "Model")
        self.source = workflows.node_id(graph, "Source prompt")
        self._prompt = with_ancestors(convert(graph, object_info), [self.saver])

    def prompt(self, **inputs: Any) -> dict[str, Any]:
        """Train and save, with these inputs of the training node changed."""
        node = {**self._prompt[self.node], "inputs": {**self._prompt[self.node]["inputs"], **inputs}}
        return {**self._prompt, self.node: node}

    def run(self, on_event: Any = None, **inputs: Any) -> PromptRun:
        return self._server.run(self.prompt(**inputs), on_event=on_event)

    def run_anew(self, **inputs: Any) -> PromptRun:
        """Executed again, whatever ran before."""
        return self._server.run(anew(self.prompt(**inputs)))

    def saved(self, run: PromptRun) -> Path:
        """The file that the run's saver wrote."""
        name = run.outputs[self.saver]["text"][0].splitlines()[0]
        return self._server.base / "models" / "likeness_embeddings" / name

    def runs_folder(self) -> Path:
        return self._server.base / "user" / "likeness" / "runs"

    def forget_runs(self) -> None:
        """Remove what earlier trainings left for resuming."""
        for path in self.runs_folder().glob("*"):
            path.unlink()
