"""The tiny networks that the official code ran on, inside ComfyUI's own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
SD_SCALE = 0.18215


def arrays(name: str) -> dict[str, torch.Tensor]:
    """A file of tests/parity/data as tensors."""
    with np.load(DATA / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def tiny_sd15():
    """ModelPatcher of an SD1.x-like UNet (32 and 64 wide, context 32, two heads), with the weights of
    embed_unet.npz.
    """
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 32,
        "transformer_depth": [1, 0],
        "transformer_depth_output": [1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "legacy": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "dtype": torch.float32,
    }
    names = comfy.utils.unet_to_diffusers(dict(config))
    model_config = comfy.supported_models.SD15(dict(config))
    model_config.unet_config["num_heads"] = 2  # the SD15 class sets 8
    with torch.inference_mode():  # as a loader node leaves it
        model = comfy.model_base.BaseModel(model_config, device="cpu")
        model.diffusion_model.load_state_dict({names[key]: value for key, value in arrays("embed_unet.npz").items()})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)
