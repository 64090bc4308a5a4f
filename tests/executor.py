"""Prompts in API form, run by ComfyUI's own validation and executor in this process: a server without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from likeness.toolbox.server import FOLDERS, PromptError, PromptRun
from likeness.toyworld import workflows

from . import inprocess, live

OWN = "models"


class _Client:
    """What the executor tells a page; nobody looks."""

    client_id: str | None = None
    last_node_id: str | None = None
    last_prompt_id: str | None = None

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_named: None


class Executor:
    """Takes the place of toolbox.server.Server for what needs no HTTP. base: models, input, output and user folders."""

    def __init__(self, base: Path) -> None:
        import execution

        self.base, self._lines = base, list[str]()
        sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self._executor = execution.PromptExecutor(_Client(), cache_type=execution.CacheType.CLASSIC, cache_args=sizes)

    def object_info(self) -> dict[str, Any]:
        """Of all nodes, as far as toolbox/graph.py asks for it."""
        import nodes

        known = nodes.NODE_CLASS_MAPPINGS.items()
        return {
            name: {"input": each.INPUT_TYPES(), "output_node": bool(getattr(each, "OUTPUT_NODE", False))}
            for name, each in known
        }

    def run(self, prompt: dict[str, Any], **_: Any) -> PromptRun:
        """Execute a prompt. PromptError when it is refused, in whole or in part, or when a node raises."""
        import execution

        identity = uuid.uuid4().hex
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(identity, prompt, None))
        if not valid or node_errors:
            data = {"error": error, "node_errors": node_errors}
            raise PromptError(error["message"] if error else "a part of the prompt was refused", data)
        self._executor.execute(copy.deepcopy(prompt), identity, {}, outputs)
        status, data = self._executor.status_messages[-1]
        if status == "execution_error":
            raise PromptError(data["exception_message"], data)
        return PromptRun(identity, status=status, outputs=self._executor.history_result["outputs"])

    def log(self) -> str:
        return "\n".join(self._lines)

    def images(self, run: PromptRun, node_id: str) -> list[Any]:
        """The images that an output node of the run saved, as PIL images."""
        import folder_paths
        from PIL import Image

        places = (
            Path(folder_paths.get_directory_by_type(entry["type"]), entry["subfolder"], entry["filename"])
            for entry in run.outputs[node_id]["images"]
        )
        return [Image.open(place) for place in places]


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


@contextlib.contextmanager
def executor(base: Path) -> Iterator[Executor]:
    """ComfyUI with the pack's nodes and the toyworld's models; its folders are as they were afterwards."""
    inprocess.start()
    import folder_paths

    before = copy.deepcopy(folder_paths.folder_names_and_paths), folder_paths.models_dir
    directories = {name: getattr(folder_paths, f"{name}_directory") for name in ("input", "output", "temp", "user")}
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    running, root = Executor(base), logging.getLogger()
    lines = _Lines(running._lines)
    try:
        for name in directories:
            setattr(folder_paths, f"{name}_directory", str(base / name))
        folder_paths.models_dir = str(base / OWN)
        for name, (_, extensions) in folder_paths.folder_names_and_paths.items():
            folder_paths.folder_names_and_paths[name] = ([str(base / OWN / name)], extensions)
        for each in workflows.MODELS.iterdir():
            if each.is_dir():
                folder_paths.add_model_folder_path(each.name, str(base / OWN / each.name))
                folder_paths.add_model_folder_path(each.name, str(each))
        folder_paths.filename_list_cache.clear()
        live.draw(base / "input")
        _register()
        root.addHandler(lines)
        yield running
    finally:
        root.removeHandler(lines)
        for name, directory in directories.items():
            setattr(folder_paths, f"{name}_directory", directory)
        folder_paths.folder_names_and_paths.clear()
        folder_paths.folder_names_and_paths.update(before[0])
        folder_paths.models_dir = before[1]
        folder_paths.filename_list_cache.clear()


def _register() -> None:
    """All nodes of core, of the pack and of the toyworld."""
    import nodes

    if "LikenessTrainEmbedding" in nodes.NODE_CLASS_MAPPINGS:
        return
    from likeness.nodes import LikenessExtension

    spec = importlib.util.spec_from_file_location(
        "toyworld_nodes", workflows.ROOT / "toyworld" / "comfyui_nodes" / "__init__.py"
    )
    assert spec is not None and spec.loader is not None
    toyworld = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toyworld)
    asyncio.run(nodes.init_builtin_extra_nodes())
    for extension in (LikenessExtension(), toyworld.SmallWorldExtension()):
        for each in asyncio.run(extension.get_node_list()):
            nodes.NODE_CLASS_MAPPINGS[each.GET_SCHEMA().node_id] = each
