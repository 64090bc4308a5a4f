"""What the pack finds in a model file, and what it refuses, from the file's header alone: no weights are read.

    COMFYUI_PATH=/path/to/ComfyUI python toolbox/_load.py tests.look_at_model /path/to/model.safetensors

For models that are newer than the table of docs/models.md. It says what the structure carries, not how images look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from . import inprocess


def shapes(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors without their numbers."""
    with safe_open(path, "pt") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {name: torch.empty(part.get_shape(), device="meta") for name, part in parts.items()}


def bare_model(path: Path) -> Any:
    """A MODEL of the file's network without weights; None for one that this ComfyUI does not know."""
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.utils

    tensors = shapes(path)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    tensors = comfy.utils.state_dict_prefix_replace(tensors, {prefix: ""}, filter_keys=True) or tensors
    config = comfy.model_detection.model_config_from_unet(tensors, "")
    if config is None:
        return None
    config.set_inference_dtype(torch.bfloat16, None)
    base = config.get_model(tensors, "", device="meta")
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def found_in(model: Any) -> Iterator[str]:
    """Lines about a model's structure, as the steps ask for it."""
    import comfy.lora

    from likeness.core.attention.host.layers import transformer_layers
    from likeness.core.ezigen.host.layers import places
    from likeness.core.inversion.host.ddim import adds_noise
    from likeness.core.lora.host.layers import network_layers
    from likeness.core.prompt.conditioning import placement_for
    from likeness.core.session.checkpointing import blocks_of
    from likeness.core.sine.host.position_map import with_position_map

    base = model.model
    axes = getattr(base.latent_format, "latent_dimensions", 2) + 2
    yield f"ComfyUI knows it as {type(base.model_config).__name__}; its latents have {axes} axes."
    flow = not adds_noise(base.model_sampling)
    yield f"It {'is a flow model: sample the noise of Invert Image' if flow else 'adds noise to the image'}."
    tail = placement_for(model, [[torch.ones(1, 20, 8), {}]]) == "tail"
    yield f"Learned tokens {'take the place of padding' if tail else 'are appended to the prompt'}."
    read = set(comfy.lora.model_lora_keys_unet(base, {}))
    for kind in ("attention", "all"):
        layers = network_layers(base, kind)
        unread = [name for name in layers if name not in read]
        yield f"LoRA, layers {kind!r}: {len(layers)}, of which stock loaders read {len(layers) - len(unread)}."
    yield f"Checkpointing computes again {len(blocks_of(base.diffusion_model))} blocks."
    steps: dict[str, Callable[[], Any]] = {
        "Replace Subject, Inspect Attention": lambda: transformer_layers(base.diffusion_model),
        "Fine-Tune with patches": lambda: with_position_map(model, 16, "bilinear"),
        "EZIGen": lambda: places(base),
    }
    for step, run in steps.items():
        try:
            run()
        except ValueError as error:
            yield f"{step}: {error}"


def report(path: Path) -> Iterator[str]:
    """All lines, or that this ComfyUI does not know the model."""
    model = bare_model(path)
    if model is None:
        yield f"This ComfyUI does not know the model of {path.name}: update ComfyUI."
        return
    yield from found_in(model)


def main(arguments: list[str]) -> int:
    """Print the report."""
    if len(arguments) != 1:
        raise SystemExit("Give one file of a model (.safetensors).")
    inprocess.start()
    print("\n".join(report(Path(arguments[0]))), flush=True)
    return 0
