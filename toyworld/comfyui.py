"""Finds the ComfyUI tree named by COMFYUI_PATH and makes its model code importable in scripts of the small world."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def comfyui_path() -> Path:
    """The ComfyUI tree; raises RuntimeError where the environment does not name one."""
    path = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (path / "comfy" / "sd1_tokenizer").is_dir():
        raise RuntimeError(f'COMFYUI_PATH is "{path}", which holds no comfy/sd1_tokenizer: set it to a ComfyUI folder.')
    return path


def prepare() -> Path:
    """Make `import comfy` work outside a server, on the CPU where there is no GPU; returns the tree's path."""
    path = comfyui_path()
    if "comfy" not in sys.modules:
        sys.path.insert(0, str(path))
        import torch
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        args.use_pytorch_cross_attention = True
    return path


def tokenizer_path() -> Path:
    """Folder of the CLIP tokenizer that ComfyUI uses for SD1.x."""
    return comfyui_path() / "comfy" / "sd1_tokenizer"
