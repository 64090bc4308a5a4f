"""ComfyUI inside the test process: its modules importable, on the CPU, with folders of the test's own."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

_folder: list[tempfile.TemporaryDirectory] = []


def start() -> None:
    """Make `import comfy...` work; models, input, output and user folders are temporary. Fails loudly without
    ComfyUI.
    """
    if _folder:
        return
    root = os.environ.get("COMFYUI_PATH")
    if not root or not (Path(root) / "comfy" / "sd.py").is_file():
        raise RuntimeError(
            f"COMFYUI_PATH is {root!r}: run the tests with `python3 toolbox/test.py`, which sets ComfyUI up."
        )
    if root not in sys.path:
        sys.path.insert(0, root)
    _folder.append(tempfile.TemporaryDirectory(prefix="likeness-tests-", ignore_cleanup_errors=True))
    options = ["--cpu", "--use-pytorch-cross-attention", "--base-directory", _folder[0].name]
    arguments, sys.argv = sys.argv, [sys.argv[0], *options]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (reads sys.argv once)
        import utils.install_util  # noqa: F401  (ComfyUI's nodes.py later puts another "utils" in front of it)
    finally:
        sys.argv = arguments
    import torch

    torch.set_num_threads(int(os.environ.get("LIKENESS_TEST_THREADS", "2")))
