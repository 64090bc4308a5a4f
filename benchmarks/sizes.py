"""Random models of ComfyUI's own classes at the published sizes, made where they are needed: no file is read.

Each has a tiny twin with the same structure, for rehearsals on a CPU. Weights are drawn so that activations stay near
1: what is measured on them is time and memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..tests.tiny_families import Family, flux_layout, lumina_layout
from ..tests.tiny_models import unet_config
from .memory_similarity import DECODER, SD1, SDXL

SAMPLE = 1 << 20  # numbers that are drawn; larger weights repeat them
FEW = {"cap_feat_dim": 64, "n_layers": 2, "n_refiner_layers": 1, "multiple_of": 16}


def clip_l(length: int, width: int, pooled: int, **more: Any) -> dict[str, Any]:
    """The prompt of a family whose encoder pads to a number of tokens."""
    return {"rows": length, "width": width, "pooled": pooled, **more}


def z_image(**more: Any) -> dict[str, Any]:
    """Z-Image's layout."""
    return lumina_layout(
        **{"rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0},
        **{"axes_lens": [1536, 512, 512], "pad_tokens_multiple": 32, **more},
    )


PUBLISHED = {
    "SD1.5": Family("BaseModel", "SD15", SD1, **clip_l(77, 768, 768), latent=(1, 4, 64, 64), image=512),
    "SDXL": Family("SDXL", "SDXL", SDXL, **clip_l(77, 2048, 1280), latent=(1, 4, 128, 128), image=1024),
    "Z-Image": Family(
        "Lumina2",
        "ZImage",
        z_image(
            **{"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "cap_feat_dim": 2560},
            **{"n_layers": 30, "n_refiner_layers": 2, "multiple_of": 256},
        ),
        *(60, 2560),
        padded=False,
        latent=(1, 16, 128, 128),
        image=1024,
    ),
    "FLUX.1": Family(
        "Flux",
        "Flux",
        flux_layout(
            **{"image_model": "flux", "context_in_dim": 4096, "hidden_size": 3072, "num_heads": 24, "depth": 19},
            **{"depth_single_blocks": 38, "axes_dim": [16, 56, 56]},
        ),
        **clip_l(512, 4096, 768),
        options=lambda _seed: {"guidance": 3.5},
        latent=(1, 16, 128, 128),
        image=1024,
    ),
}
NARROW: dict[str, dict[str, Any]] = {
    "SD1.5": {"unet": unet_config(32, 768), "latent": (1, 4, 8, 8)},
    "SDXL": {
        "unet": unet_config(64, 2048, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential"),
        "latent": (1, 4, 8, 8),
    },
    "Z-Image": {
        "unet": z_image(dim=256, n_heads=4, n_kv_heads=4, axes_dims=[16, 24, 24], **FEW),
        "latent": (1, 16, 8, 8),
        "width": 64,
    },
    "FLUX.1": {"unet": flux_layout(image_model="flux"), "latent": (1, 16, 8, 8), "width": 64, "rows": 64},
}


def families(tiny: bool) -> dict[str, Family]:
    """Those that the running ComfyUI knows, the smallest first."""
    known = {name: family for name, family in PUBLISHED.items() if family.known}
    return {name: replace(each, **NARROW[name], image=64) for name, each in known.items()} if tiny else known


def fill(module: torch.nn.Module) -> None:
    """Give every weight numbers; ComfyUI's layers start as uninitialised memory."""
    drawn = torch.randn(SAMPLE)
    for name, value in module.named_parameters():
        if value.ndim < 2:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        sample = (drawn * (0.7 / value[0].numel() ** 0.5)).to(value.dtype)
        for part in value.flatten().split(SAMPLE):
            part.copy_(sample[: len(part)])


@dataclass(frozen=True)
class Precision:
    """In which dtype the weights are stored; compute: another one to compute in."""

    stored: torch.dtype
    compute: torch.dtype | None = None


PRECISIONS = {"bf16": Precision(torch.bfloat16)}
if hasattr(torch, "float8_e4m3fn"):
    PRECISIONS["fp8"] = Precision(torch.float8_e4m3fn, torch.bfloat16)


def free_ram() -> int:
    """Bytes of the machine's memory that are free."""
    import psutil

    return psutil.virtual_memory().available


def weight_bytes(family: Family, how: Precision) -> int:
    """Bytes of a family's weights."""
    return sum(value.nbytes for value in network_of(family, how, torch.device("meta")).parameters())


def network_of(family: Family, how: Precision, device: torch.device) -> Any:
    """A model in ComfyUI's own class, whose weights are no numbers yet."""
    import comfy.model_base
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)({**family.unet, "dtype": how.stored})
    if how.compute:
        config.set_inference_dtype(how.stored, how.compute)
    return getattr(comfy.model_base, family.base)(config, device=device)


def model_of(family: Family, how: Precision) -> Any:
    """A MODEL as a loader node leaves it, off the card; under dynamic VRAM one that is streamed."""
    import comfy.model_management as mm
    import comfy.model_patcher

    def made(disable_dynamic: bool = False) -> Any:
        with torch.inference_mode():
            model = network_of(family, how, mm.unet_offload_device())
            fill(model.diffusion_model)
        plain = comfy.model_patcher.ModelPatcher
        kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
        patcher = kind(model, mm.get_torch_device(), mm.unet_offload_device())
        setattr(patcher, "cached_patcher_init", (made, ()))  # noqa: B010 (for newer ComfyUI's fixed copy of a streamed one)
        return patcher

    return made()


def autoencoder(family: Family, tiny: bool) -> Any:
    """A VAE with the layout of SD's, of the family's number of channels."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    layout = {**DECODER, "z_channels": family.latent[1]}
    layout |= {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1} if tiny else {}
    params = {"ddconfig": layout, "embed_dim": family.latent[1]}
    with torch.inference_mode():
        net = AutoencoderKL(**params)
        fill(net)
        vae = comfy.sd.VAE(sd=net.state_dict(), config={"params": params})
    vae.latent_channels = family.latent[1]
    return vae


def one_by_one(model: Any) -> Any:
    """A clone of a MODEL whose positive and negative are never in one batch."""
    import comfy.samplers

    def apart(call: dict[str, Any]) -> list[torch.Tensor]:
        rest = (call["input"], call["sigma"], call["model_options"])
        return [comfy.samplers.calc_cond_batch(call["model"], [each], *rest)[0] for each in call["conds"]]

    clone = model.clone()
    clone.model_options["sampler_calc_cond_batch_function"] = apart
    return clone
