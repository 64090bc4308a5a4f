"""ComfyUI in this process, on the CPU, with the small world's models."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

CHECKPOINT = "likeness_small_world.safetensors"


def start(threads: int) -> Path:
    """Make ComfyUI importable (COMFYUI_PATH names it); returns a temporary base folder with models, input, output
    and user.
    """
    root = os.environ.get("COMFYUI_PATH")
    if not root or not (Path(root) / "comfy" / "sd.py").is_file():
        sys.exit(f"COMFYUI_PATH is {root!r}: set it to a ComfyUI folder, such as the one that toolbox/demo.py makes.")
    base = Path(tempfile.mkdtemp(prefix="likeness-benchmark-"))
    sys.path.insert(0, root)
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu", "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)
    import utils.install_util  # noqa: F401  (ComfyUI's nodes.py later puts another "utils" in front of it)

    sys.argv = arguments
    import torch

    torch.set_num_threads(threads)
    return base


def keep_runs(folder: Path | None) -> None:
    """Keep finished trainings in a folder, and take them from there, where one was given."""
    if folder:
        import folder_paths

        folder_paths.set_user_directory(str(folder.resolve()))


def small_world(base: Path):
    """MODEL, CLIP and VAE of the small world, through ComfyUI's own checkpoint loader."""
    import comfy.sd
    import torch

    from ..toyworld.build import build_checkpoint

    path = build_checkpoint(base / "models" / "checkpoints" / CHECKPOINT)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]
