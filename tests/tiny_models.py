"""Random models of ComfyUI's own classes, small enough for a laptop: one for each family the pack supports."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")
_shared: dict[Any, Any] = {}
EXACT = {"dtype": torch.float32}  # text encoders are float16 otherwise, in which a LoRA is rounded as it is put on


def randomise(module: nn.Module, seed: int, gain: float = 0.7) -> None:
    """Weights that keep activations near 1, whatever the depth; ComfyUI's layers start as uninitialised memory."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if value.ndim >= 2:
            drawn = torch.randn(value.shape, generator=generator).mul_(gain).div_(value[0].numel() ** 0.5)
        else:
            drawn = torch.zeros(value.shape) if name.endswith("bias") else torch.ones(value.shape)
        with torch.no_grad():
            value.copy_(drawn)


def shared(key: Any, make: Callable[[], Any]) -> Any:
    """What make() gives, a MODEL or CLIP, for tests that leave its weights as they are: made once, lent as a clone."""
    if key not in _shared:
        _shared[key] = make()
    return _shared[key].clone()


def restore_shared() -> None:
    """Take back what MODELs that are gone have left on shared networks, and let ComfyUI forget them: it would collect
    garbage at each load.
    """
    import comfy.model_management as mm

    mm.current_loaded_models[:] = [each for each in mm.current_loaded_models if not each.is_dead()]
    for each in _shared.values():
        patcher = getattr(each, "patcher", each)
        if patcher.backup or patcher.object_patches_backup:
            with torch.inference_mode():
                patcher.detach()


def unet_config(width: int, context: int, **more) -> dict:
    """What ComfyUI detects of a UNet with two levels, one block each, and attention in both on either side."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": width,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "use_spatial_transformer": True,
        "context_dim": context,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [0, 1, 0, 1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "legacy": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "dtype": torch.float32,
        **more,
    }


def _patcher(base_class, config_class, unet_config: dict, prediction: str, seed: int):
    import comfy.model_base
    import comfy.model_patcher

    with torch.inference_mode():  # as a loader node leaves it
        config = config_class(unet_config)
        model = base_class(config, model_type=comfy.model_base.ModelType[prediction], device="cpu")
        randomise(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def sd1(seed: int = 0, **more):
    """SD1.x: eps-prediction, text rows of width 768."""
    import comfy.model_base
    import comfy.supported_models

    config = unet_config(32, 768, **more)
    return _patcher(comfy.model_base.BaseModel, comfy.supported_models.SD15, config, "EPS", seed)


def sd2_base(seed: int = 0, context: int = 16):
    """SD2.1-base in its own layout of 16 transformer blocks, with heads of 8: eps-prediction."""
    import comfy.model_base
    import comfy.supported_models

    class Narrow(comfy.supported_models.SD20):
        unet_extra_config = {**comfy.supported_models.SD20.unet_extra_config, "num_head_channels": 8}

    layout = {
        **{"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 1, 1], "use_linear_in_transformer": True},
        **{"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3},
    }
    return _patcher(comfy.model_base.BaseModel, Narrow, unet_config(32, context, **layout), "EPS", seed)


def sd2_v(seed: int = 0):
    """SD2.x at 768: v-prediction, text rows of width 1024."""
    import comfy.model_base
    import comfy.supported_models

    config = unet_config(64, 1024, use_linear_in_transformer=True)
    return _patcher(comfy.model_base.BaseModel, comfy.supported_models.SD20, config, "V_PREDICTION", seed)


def sdxl(seed: int = 0):
    """SDXL: eps-prediction, text rows of width 2048, a pooled vector of 1280."""
    import comfy.model_base
    import comfy.supported_models

    config = unet_config(64, 2048, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential")
    return _patcher(comfy.model_base.SDXL, comfy.supported_models.SDXL, config, "EPS", seed)


def flux(seed: int = 0):
    """FLUX.1-schnell: a flow model, text rows of width 64 here, a pooled vector of 768, 16 latent channels."""
    import comfy.ldm.flux.model
    import comfy.model_base
    import comfy.supported_models

    config = {
        **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64},
        **{"hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2},
        **{"axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False},
        "dtype": torch.float32,
    }
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__:  # newer ComfyUI
        config["txt_ids_dims"] = []
    return _patcher(comfy.model_base.Flux, comfy.supported_models.FluxSchnell, config, "FLOW", seed)


FAMILIES = {"sd1": (sd1, 768, 768), "sd2_v": (sd2_v, 1024, 1024), "sdxl": (sdxl, 2048, 1280)}
"""Family -> (function of a seed, width of the text rows, width of the pooled vector)."""

TRANSFORMERS = {"flux": (flux, 64, 768)}
"""The same, of families that only the likeness optimisation knows."""


def prompt(family: str, seed: int, end: int | None = 6) -> list:
    """CONDITIONING of random rows. With `end`, the pooled vector says that the text ends there (where the widths
    allow).
    """
    _, width, pooled = {**FAMILIES, **TRANSFORMERS}[family]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, 77, width, generator=generator)
    vector = (
        rows[:, end].clone() if end is not None and width == pooled else torch.randn(1, pooled, generator=generator)
    )
    return [[rows, {"pooled_output": vector}]]


def taesd(seed: int = 0, channels: int = 4):
    """A VAE with TAESD's layout: 8 x smaller; 4 channels, or 16 as FLUX has them."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    net = TAESD(latent_channels=channels)
    randomise(net, seed, gain=1.0)
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("vae_")}
    state |= {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=state)


def kl_autoencoder(seed: int = 0):
    """A VAE with the layout of SD's own: 8 x smaller, four channels, narrow."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    layout = {
        **{"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32},
        **{"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
    }
    config = {"params": {"ddconfig": layout, "embed_dim": 4}}
    with torch.inference_mode():
        net = AutoencoderKL(**config["params"])
        randomise(net, seed, gain=1.0)
        return comfy.sd.VAE(sd=net.state_dict(), config=config)


def _text_encoder(*described: Any):
    """A CLIP of random weights; its networks are made once, as their tables of tokens are large."""
    return shared(repr(described), lambda: _new_text_encoder(*described))


def _new_text_encoder(module: str, kind: str, options: dict, seed: int, params: dict | None = None):
    """Of the classes that a module of ComfyUI has for this kind."""
    import comfy.sd

    library = importlib.import_module(f"comfy.{module}")
    model = getattr(library, f"{kind}ClipModel", None) or getattr(library, f"{kind}TEModel")
    tokenizer = getattr(library, f"{kind}Tokenizer")
    target = type("Target", (), {"params": params or {}, "clip": model, "tokenizer": tokenizer})
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options=options)
        randomise(clip.cond_stage_model, seed)
    return clip


def clip_l_exact():
    """SD1.x's in float32: the stock loader rounds patched weights to an encoder's own precision."""
    return clip_l(**EXACT)


def clip_l(seed: int = 0, layers: int = 2, **more):
    """SD1.x's text encoder with few layers."""
    return _text_encoder("sd1_clip", "SD1", {"clip_l_model_config": {"num_hidden_layers": layers}, **more}, seed)


FEW = {"num_hidden_layers": 3, "intermediate_size": 256}  # the rows are taken from the last but one


def clip_h(seed: int = 0):
    """SD2.x's text encoder with few layers."""
    return _text_encoder("text_encoders.sd2_clip", "SD2", {"clip_h_model_config": FEW, **EXACT}, seed)


def clip_xl(seed: int = 0):
    """SDXL's two text encoders with few layers."""
    few = {"clip_l_model_config": FEW, "clip_g_model_config": FEW}
    return _text_encoder("sdxl_clip", "SDXL", {**few, **EXACT}, seed)


def clip_flux(seed: int = 0):
    """FLUX's text encoders with few layers: CLIP-L, and a T5 of width 64."""
    few = {"clip_l_model_config": {**FEW, "num_hidden_layers": 2}}
    few["t5xxl_model_config"] = {"num_layers": 1, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 2}
    return _text_encoder("text_encoders.flux", "Flux", {**few, **EXACT}, seed, {"dtype_t5": torch.float32})


def clip_qwen(width: int, seed: int = 0):
    """Z-Image's text encoder with few layers, and as wide as a tiny model wants it: no padding, a chat's frame."""
    few = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 3}
    few |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return _text_encoder("text_encoders.z_image", "ZImage", {"qwen3_4b_model_config": few, **EXACT}, seed)


def controlnet(seed: int = 0):
    """A ControlNet for sd1()."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = unet_config(32, 768, num_heads=8, num_head_channels=-1)
    for name in ("out_channels", "transformer_depth_output", "use_temporal_attention"):
        config.pop(name)
    with torch.inference_mode():
        net = comfy.cldm.cldm.ControlNet(
            hint_channels=3, operations=comfy.ops.disable_weight_init, device="cpu", **config
        )
        randomise(net, seed)
    return comfy.controlnet.ControlNet(net, load_device=CPU, manual_cast_dtype=None)
