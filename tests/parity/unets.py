"""The tiny networks that the official code ran on, inside ComfyUI's own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..tiny_models import CPU, unet_config

DATA = Path(__file__).parent / "data"
SD_SCALE = 0.18215


def arrays(name: str, without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A file of tests/parity/data as tensors."""
    with np.load(DATA / name) as file:
        return {key: torch.as_tensor(file[key]) for key in file if key not in without}


def tiny_sd15():
    """ModelPatcher of an SD1.x-like UNet (32 and 64 wide, context 32, two heads), with the weights of
    embed_unet.npz.
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = unet_config(32, 32, num_heads=2, transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0])
    names = comfy.utils.unet_to_diffusers(dict(config))
    model_config = comfy.supported_models.SD15(dict(config))
    model_config.unet_config["num_heads"] = 2  # the SD15 class sets 8
    with torch.inference_mode():  # as a loader node leaves it
        model = comfy.model_base.BaseModel(model_config, device="cpu")
        model.diffusion_model.load_state_dict({names[key]: value for key, value in arrays("embed_unet.npz").items()})
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)
