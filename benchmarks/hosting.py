"""ComfyUI in this process, mostly on the CPU, with toyworld's models."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKPOINT = "likeness_small_world.safetensors"
LATENT = (1, 4, 12, 12)  # of a 96 px image


def start(threads: int, cpu: bool = True) -> Path:
    """Make ComfyUI importable (COMFYUI_PATH names it, else the one whose custom_nodes hold the pack); returns a
    temporary base folder with models, input, output and user.
    """
    root = os.environ.get("COMFYUI_PATH") or str(Path(__file__).resolve().parents[3])
    if not (Path(root) / "comfy" / "sd.py").is_file():
        sys.exit(f"There is no ComfyUI in {root}: set COMFYUI_PATH to one, such as the one that toolbox/demo.py makes.")
    base = Path(tempfile.mkdtemp(prefix="likeness-benchmark-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)  # stored runs of whole models are large
    sys.path.insert(0, root)
    arguments, sys.argv = sys.argv, [sys.argv[0], *(["--cpu"] if cpu else []), "--base-directory", str(base)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  (reads sys.argv once)
    import utils.install_util  # noqa: F401  (ComfyUI's nodes.py later puts another "utils" in front of it)

    sys.argv = arguments
    import torch

    torch.set_num_threads(threads)
    return base


def keep_runs(folder: Path | None) -> None:
    """Keep finished trainings in a folder, and take them from there, if one is given."""
    if folder:
        import folder_paths

        folder_paths.set_user_directory(str(folder.resolve()))


def small_world(base: Path, name: str = ""):
    """MODEL, CLIP and VAE of toyworld, or of another of its generators, through ComfyUI's own checkpoint loader."""
    import comfy.sd
    import torch

    from ..toyworld import build

    path = base / "models" / "checkpoints" / (build.OTHER.format(name) if name else CHECKPOINT)
    path = build.write(dict(build.other_checkpoints())[name], path) if name else build.build_checkpoint(path)
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


def encoded(clip: Any, *prompts: str) -> list[Any]:
    """The CONDITIONING of each prompt."""
    import torch

    with torch.inference_mode():
        return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]


def levels(model: Any, steps: int, scheduler: str = "ddim_uniform") -> Any:
    """The sigmas of a sampling."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def plain_attention() -> dict[str, Any]:
    """Transformer options with the attention that the pack's sessions use."""
    from comfy.ldm.modules.attention import attention_pytorch

    return {"optimized_attention_override": lambda _chosen, *a, **k: attention_pytorch(*a, **k)}


def latents(count: int = 1, shape: tuple[int, ...] = LATENT) -> Any:
    """Noise, as a trajectory of `count` entries."""
    import torch

    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
