"""Build the files that ComfyUI loads: the checkpoints of the small world and the folders of its vision models."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from . import assets, comfyui, flow_network
from .vision_models import build_vision_folders
from .widen import Tensors, checkpoint, widen_adapter

CHECKPOINT = "likeness_small_world.safetensors"
OTHER = "likeness_small_world_{}.safetensors"  # turbo, flow, flow_turbo
ADAPTER = "likeness_small_world.safetensors"
NARROW_ADAPTER = "likeness_small_world_narrow.safetensors"


def write(tensors: Tensors, path: Path) -> Path:
    """Store a checkpoint."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, str(part), metadata={"format": "pt"})
    os.replace(part, path)
    return path


def build_checkpoint(path: Path) -> Path:
    """Widen the committed generator into an SD1.x checkpoint at `path` (340 MB)."""
    narrow = assets.read("generator")
    return write(checkpoint(narrow, narrow["vocabulary"].tolist()), path)


def other_checkpoints(folder: Path = assets.ASSETS) -> Iterator[tuple[str, Tensors]]:
    """Name and tensors of the flow transformer's and both students' checkpoints, of those that are committed."""
    first = assets.read("generator", folder)
    vocabulary, flow = first["vocabulary"].tolist(), {}
    text = {key: value for key, value in first.items() if key.startswith("text.")}
    if assets.exists("turbo", folder):
        yield "turbo", checkpoint(assets.read_turbo(folder), vocabulary)
    for name in ("flow", "flow_turbo"):
        if assets.exists(name, folder):
            flow |= assets.read(name, folder)
            yield name, flow_network.checkpoint(text | flow, vocabulary)


def build_adapter(folder: Path) -> dict[str, Path]:
    """The committed subject adapter, if there is one, as two files in `folder`, for the wide checkpoint and at its
    trained width; returns their paths by name.
    """
    if not assets.exists("adapter"):
        return {}
    narrow = assets.read("adapter")
    wide = write(widen_adapter(narrow), folder / ADAPTER)
    return {"adapter": wide, "narrow adapter": write(narrow, folder / NARROW_ADAPTER)}


def build(models_dir: str | Path, comfyui_path: str | Path | None = None) -> dict[str, Path]:
    """Write every model of the small world under `models_dir`; returns their paths by name.

    `comfyui_path` is the ComfyUI tree whose tokenizer is copied; without it the environment's COMFYUI_PATH is used.
    """
    if comfyui_path is not None:
        os.environ["COMFYUI_PATH"] = str(comfyui_path)
    comfyui.prepare()
    assets.check()
    models = Path(models_dir)
    paths = {"checkpoint": build_checkpoint(models / "checkpoints" / CHECKPOINT)}
    for name, tensors in other_checkpoints():
        paths[name] = write(tensors, models / "checkpoints" / OTHER.format(name))
    return paths | build_vision_folders(models / "likeness_vision") | build_adapter(models / "likeness_adapters")


def main(arguments: list[str]) -> None:
    """`run.py build <models folder> [--comfyui folder]`."""
    parser = argparse.ArgumentParser(prog="run.py build")
    parser.add_argument("models", help="ComfyUI's models folder, or any folder in extra_model_paths.yaml")
    parser.add_argument("--comfyui", default=None, help="ComfyUI tree (default: COMFYUI_PATH)")
    options = parser.parse_args(arguments)
    for name, path in build(options.models, options.comfyui).items():
        sys.stdout.write(f"{name}: {path}\n")
