"""A real ComfyUI with the pack and the small world, for the server and the browser tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from likeness.toolbox import small_world
from likeness.toolbox.graph import convert, with_ancestors
from likeness.toolbox.server import Run, Server, environment_from_variables

NAMES = tuple(sorted(path.stem for path in small_world.WORKFLOWS.glob("*.json")))
PACK = next(iter(small_world.NODE_FOLDERS))
STEPS, SAMPLING_STEPS = 10, 3
ITERATIONS = 4  # of a likeness optimisation, which makes a whole picture in each
# Ten steps on all weights would show no more, and write half a gigabyte each time.
QUICK = {
    ("LikenessFineTune", "method"): "LoRA",
    ("LikenessFineTune", "learning_rate"): 2e-3,
    ("LikenessRefineEmbedding", "inner_steps"): 2,
    ("LikenessOptimizeLora", "iterations"): ITERATIONS,
    ("LikenessOptimizeLora", "grad_steps"): 1,
}
EXACT, EXACT_STEPS = ("LikenessInvert", "LikenessRefineEmbedding"), 5  # a number that ddim_uniform keeps to
STAGED = ("LikenessLoadAdapter",)  # of so many steps, two look at the subject


def start(base: Path, frontend: Path | None = None) -> Server:
    """A server that is not started yet. Fails loudly when the small world's models are not there."""
    if not (small_world.MODELS / "checkpoints" / small_world.CHECKPOINT).is_file():
        raise RuntimeError("The small world's models are missing: run the tests with `python3 toolbox/test.py`.")
    server = Server(environment_from_variables(), base, small_world.NODE_FOLDERS, small_world.MODELS, frontend)
    picture = small_world.draw_subject(base / "input")
    shutil.copy(picture, picture.with_name("example.png"))  # what a shipped graph names; every ComfyUI brings one
    return server


def lowered(name: str, object_info: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A shipped graph in the small world with few steps."""
    graph = small_world.shipped(name)
    quick: dict[tuple[str, str], Any] = {key: value for key, value in QUICK.items() if small_world.has(graph, key[0])}
    if any(small_world.has(graph, name) for name in EXACT):
        quick["BasicScheduler", "steps"] = EXACT_STEPS
    settings = {**quick, **(more.get("settings") or {})}
    sampling = EXACT_STEPS if any(small_world.has(graph, name) for name in STAGED) else SAMPLING_STEPS
    return small_world.in_small_world(graph, object_info, STEPS, sampling, settings)


class Training:
    """The training part of the shipped graph, as prompts for the server."""

    def __init__(self, server: Server, object_info: dict[str, Any]) -> None:
        self._server = server
        graph = lowered("hiper_train_and_edit", object_info)
        self.node = small_world.node_id(graph, "Learn the subject")
        self.saver = small_world.node_id(graph, "Save the subject")
        self.loader = small_world.node_id(graph, "Model")
        self.source = small_world.node_id(graph, "Source prompt")
        self._prompt = with_ancestors(convert(graph, object_info), [self.saver])

    def prompt(self, **inputs: Any) -> dict[str, Any]:
        """Train and save, with these inputs of the training node changed."""
        node = {**self._prompt[self.node], "inputs": {**self._prompt[self.node]["inputs"], **inputs}}
        return {**self._prompt, self.node: node}

    def run(self, on_event: Any = None, **inputs: Any) -> Run:
        return self._server.run(self.prompt(**inputs), on_event=on_event)

    def saved(self, run: Run) -> Path:
        """The file that the run's saver wrote."""
        name = run.outputs[self.saver]["text"][0].splitlines()[0]
        return self._server.base / "models" / "likeness_embeddings" / name

    def runs_folder(self) -> Path:
        return self._server.base / "user" / "likeness" / "runs"

    def forget_runs(self) -> None:
        """Remove what earlier trainings left for resuming."""
        for path in self.runs_folder().glob("*"):
            path.unlink()
