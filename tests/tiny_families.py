"""Random models of ComfyUI's transformer families, small enough for a laptop, each with prompts and latents of its own.

Only what the running ComfyUI knows is run. Text encoders are left out: the prompts have the shape, and the options,
that the family's own encoder gives.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import tiny_models, tiny_sana

Options = Callable[[int], dict[str, Any]]


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mask(length: int, used: int) -> torch.Tensor:
    return (torch.arange(length) < used).long()[None]


@dataclass(frozen=True)
class Family:
    """base and config: names of ComfyUI's classes. rows: a prompt's number of token embeddings, and how many more it
    has with each seed where the encoder does not pad. zeros: how many of them are padding of zeros. latent and image:
    the shape of one image's latents, and the side of a training square. pixels: of a latent's cell. vae: the name of a
    function in this file, None without a tiny one.
    """

    base: str
    config: str
    unet: dict[str, Any]
    rows: int
    width: int
    pooled: int = 0
    padded: bool = True
    zeros: int = 0
    options: Options = lambda _seed: {}
    latent: tuple[int, ...] = (1, 16, 4, 4)
    image: int = 64
    pixels: int = 8
    vae: str | None = "taesd16"

    @property
    def known(self) -> bool:
        """Whether this ComfyUI has the family."""
        import comfy.model_base
        import comfy.supported_models

        return hasattr(comfy.model_base, self.base) and hasattr(comfy.supported_models, self.config)

    def model(self, seed: int = 0):
        """A MODEL."""
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models

        with torch.inference_mode():  # as a loader node leaves it
            config = getattr(comfy.supported_models, self.config)({**self.unet, "dtype": torch.float32})
            model = getattr(comfy.model_base, self.base)(config, device="cpu")
            tiny_models.randomise(model.diffusion_model, seed)
            for name, value in model.diffusion_model.named_buffers():
                if name.endswith("pos_embed"):  # a table of positions is read from the file
                    value.copy_(0.1 * _draw(seed + 5, *value.shape))
        return comfy.model_patcher.ModelPatcher(model, tiny_models.CPU, tiny_models.CPU)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents' image."""
        return self.latent[-2] * self.pixels, self.latent[-1] * self.pixels

    def prompt(self, seed: int) -> list:
        """CONDITIONING of random token embeddings."""
        rows = _draw(seed, 1, self.rows + (0 if self.padded else seed), self.width)
        if self.zeros:
            rows[:, -self.zeros :] = 0
        pooled = {"pooled_output": _draw(seed + 50, 1, self.pooled)} if self.pooled else {"pooled_output": None}
        return [[rows, {**pooled, **self.options(seed)}]]

    def latents(self, seed: int = 5) -> torch.Tensor:
        """The samples of a LATENT."""
        return _draw(seed, *self.latent)

    def autoencoder(self):
        """The VAE."""
        return None if self.vae is None else globals()[self.vae]()


class LoadedSana(Family):
    """Sana, which ComfyUI does not know: a diffusers folder's, as the pack loads it. base and config are not used."""

    @property
    def known(self) -> bool:
        """Whether diffusers is installed."""
        return importlib.util.find_spec("diffusers") is not None

    def model(self, seed: int = 0):
        from likeness.core.sana.host.sana import load_model

        with torch.inference_mode():
            return load_model(tiny_sana.folder(seed), "fp32")


def if_known(module: str, params: str, **fields: Any) -> dict[str, Any]:
    """The fields that the running ComfyUI asks for."""
    try:
        known = getattr(importlib.import_module(module), params).__annotations__
    except (ImportError, AttributeError):
        return {}
    return {name: value for name, value in fields.items() if name in known}


def flux_layout(**more: Any) -> dict[str, Any]:
    """FLUX's layout with two blocks of each kind."""
    return {
        **{"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 64, "hidden_size": 32},
        **{"mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]},
        **{"theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True},
        **if_known("comfy.ldm.flux.model", "FluxParams", txt_ids_dims=[]),
        **more,
    }


def lumina_layout(**more: Any) -> dict[str, Any]:
    return {
        **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 64, "n_layers": 2},
        **{"n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 8, 8]},
        **{"axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0, "multiple_of": 16},
        **more,
    }


def _cosmos(model: str, text: int) -> dict[str, Any]:
    return {
        **{"image_model": model, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16},
        **{"out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96, "num_heads": 2},
        **{"concat_padding_mask": True, "crossattn_emb_channels": text, "pos_emb_cls": "rope3d", "num_blocks": 2},
        **{"pos_emb_learnable": True, "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16},
    }


QWEN = {
    **{"image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2},
    **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (4, 6, 6)},
}
FRAME = (1, 16, 1, 4, 4)


def families() -> dict[str, Family]:
    """Every transformer family of the running ComfyUI."""
    return {name: family for name, family in listed().items() if family.known}


@functools.cache
def listed() -> dict[str, Family]:
    """Every transformer family, also of a newer ComfyUI."""
    return {
        "SD3.5": Family(
            "SD3",
            "SD3",
            {
                **{"in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "num_patches": 4096},
                **{"pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": 2048},
                **{"qk_norm": "rms", "x_block_self_attn_layers": [0]},
                "context_embedder_config": {
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 4096, "out_features": 128},
                },
            },
            *(154, 4096, 2048),
        ),
        "FLUX.1": Family(
            "Flux", "Flux", flux_layout(image_model="flux"), 256, 64, 768, options=lambda _: {"guidance": 3.5}
        ),
        "FLUX.2": Family(
            "Flux2",
            "Flux2",
            flux_layout(
                **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None},
                **{"context_in_dim": 48, "hidden_size": 64, "mlp_ratio": 3.0, "axes_dim": [8] * 4, "theta": 2000},
                **{"patch_size": 1, "qkv_bias": False, "global_modulation": True, "mlp_silu_act": True},
                **{"ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0},
                **if_known("comfy.ldm.flux.model", "FluxParams", txt_ids_dims=[3]),
            ),
            *(40, 48),
            padded=False,
            options=lambda _: {"guidance": 4.0},
            latent=(1, 128, 4, 4),
            pixels=16,
            vae="flux2_vae",
        ),
        "Chroma": Family(
            "Chroma",
            "Chroma",
            {
                **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 64},
                **{"hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2},
                **{"axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "in_dim": 64},
                **{"out_dim": 64, "hidden_dim": 64, "n_layers": 2},
                **if_known("comfy.ldm.chroma.model", "ChromaParams", txt_ids_dims=[], vec_in_dim=None),
            },
            *(12, 64),
            padded=False,
        ),
        "Z-Image": Family(
            "Lumina2",
            "ZImage",
            lumina_layout(
                **{"dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24], "rope_theta": 256.0},
                **{"axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True},
                **{"time_scale": 1000.0, "pad_tokens_multiple": 32},
            ),
            *(20, 64),
            padded=False,
        ),
        "Lumina2": Family(
            "Lumina2",
            "Lumina2",
            lumina_layout(),
            *(20, 64),
            padded=False,
            options=lambda seed: {"attention_mask": _mask(20 + seed, 20 + seed)},
        ),
        "Qwen-Image": Family("QwenImage", "QwenImage", QWEN, 20, 64, padded=False, latent=FRAME, vae="wan_vae"),
        "Qwen-Image-Edit": Family(
            "QwenImage",
            "QwenImage",
            QWEN,
            *(20, 64),
            padded=False,
            options=lambda seed: {"reference_latents": [_draw(seed + 77, *FRAME)]},
            latent=FRAME,
            vae="wan_vae",
        ),
        "HiDream": Family(
            "HiDream",
            "HiDream",
            {
                **{"image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1},
                **{"num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "text_emb_dim": 64},
                **{"caption_channels": [64, 64], "num_routed_experts": 4, "num_activated_experts": 2},
                **{"axes_dims_rope": [8, 4, 4], "max_resolution": [16, 16], "llama_layers": [0, 1]},
            },
            *(128, 64, 64),
            padded=False,  # it does, to 128; but ComfyUI names no tokenizer for it
            options=lambda seed: {"conditioning_llama3": _draw(seed + 9, 1, 2, 128, 64)},
        ),
        "AuraFlow": Family(
            "AuraFlow",
            "AuraFlow",
            {
                **{"in_channels": 4, "out_channels": 4, "patch_size": 2, "dim": 64, "n_layers": 3, "n_heads": 2},
                **{"n_double_layers": 1, "global_conddim": 64, "cond_seq_dim": 64, "max_seq": 4096},
            },
            *(256, 64),
            latent=(1, 4, 8, 8),
            vae="taesd4",
        ),
        "PixArt": Family(
            "PixArt",
            "PixArtSigma",
            {
                **{"image_model": "pixart_sigma", "input_size": 128, "pe_interpolation": 2, "patch_size": 2},
                **{"in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 64},
                **{"micro_condition": False, "model_max_length": 300},
            },
            *(12, 64),
            padded=False,
            latent=(1, 4, 4, 62),  # its positions want 33 or more in the mean
            image=272,
            vae="taesd4",
        ),
        "HunyuanDiT": Family(
            "HunyuanDiT",
            "HunyuanDiT",
            {
                **{"image_model": "hydit", "hidden_size": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 4.0},
                **{"text_states_dim": 64, "text_states_dim_t5": 64, "size_cond": False, "use_style_cond": False},
            },
            *(77, 64),
            options=lambda seed: {
                **{"attention_mask": _mask(77, 9), "attention_mask_mt5xl": _mask(256, 9)},
                "conditioning_mt5xl": _draw(seed + 9, 1, 256, 64),
            },
            latent=(1, 4, 4, 4),
            vae="taesd4",
        ),
        "OmniGen2": Family(
            "Omnigen2",
            "Omnigen2",
            {
                **{"image_model": "omnigen2", "patch_size": 2, "in_channels": 16, "hidden_size": 48, "num_layers": 2},
                **{"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16},
                **{"axes_dim_rope": (8, 8, 8), "axes_lens": (300, 512, 512), "text_feat_dim": 64},
                "timestep_scale": 1000.0,
            },
            *(20, 64),
            padded=False,
            options=lambda seed: {"attention_mask": _mask(20 + seed, 20 + seed)},
        ),
        "Cosmos-Predict2": Family(
            "CosmosPredict2",
            "CosmosT2IPredict2",
            _cosmos("cosmos_predict2", 64),
            *(512, 64),
            zeros=480,
            options=lambda _: {"attention_mask": _mask(512, 32)},
            latent=FRAME,
            vae="wan_vae",
        ),
        "Wan": Family(
            "WAN21",
            "WAN21_T2V",
            {
                **{"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": 48, "ffn_dim": 96},
                **{"freq_dim": 32, "text_dim": 64, "text_len": 512, "in_dim": 16, "out_dim": 16, "num_heads": 2},
                "num_layers": 2,
            },
            *(512, 64),
            zeros=480,
            latent=FRAME,
            vae="wan_vae",
        ),
        "LTXV": Family(
            "LTXV",
            "LTXV",
            {
                **{"image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32},
                **{"num_attention_heads": 2, "caption_channels": 64, "num_layers": 2},
            },
            *(128, 64),
            options=lambda _: {"attention_mask": _mask(128, 12)},
            latent=(1, 128, 1, 4, 4),
            image=128,
            pixels=32,
            vae="ltxv_vae",
        ),
        "HunyuanVideo": Family(
            "HunyuanVideo",
            "HunyuanVideo",
            {
                **{"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2], "out_channels": 16},
                **{"vec_in_dim": 768, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2},
                **{"axes_dim": [8, 12, 12], "depth": 2, "depth_single_blocks": 2, "theta": 256, "qkv_bias": True},
                **{"guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False},
                "vision_in_dim": None,
                **if_known("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams", meanflow_sum=False),
            },
            *(20, 64, 768),
            padded=False,
            options=lambda _: {"guidance": 6.0},
            latent=FRAME,
            vae="wan_vae",
        ),
        "Anima": Family(
            "Anima",
            "Anima",
            _cosmos("anima", 1024),
            *(20, 1024),
            padded=False,
            options=lambda seed: {
                "t5xxl_ids": torch.randint(3, 30000, (12 + seed,), generator=torch.Generator().manual_seed(seed)),
                "t5xxl_weights": torch.ones(12 + seed),
            },
            latent=FRAME,
            vae="wan_vae",
        ),
        "Sana": LoadedSana(
            *("", "", {}, 12, tiny_sana.CAPTION),
            padded=False,
            latent=(1, tiny_sana.CHANNELS, 4, 4),
            image=128,
            pixels=32,
            vae="sana_vae",
        ),
    }


@functools.cache
def taesd4():
    """TAESD for four channels."""
    return tiny_models.taesd(channels=4)


@functools.cache
def taesd16():
    """TAESD for sixteen channels."""
    return tiny_models.taesd(channels=16)


@functools.cache
def sana_vae():
    """Sana's: 32 x smaller."""
    from likeness.core.sana.host.sana import load_sana

    with torch.inference_mode():
        return load_sana(tiny_sana.folder())[2]


@functools.cache
def wan_vae():
    """Wan's and Qwen-Image's VAE, whose latents have a frame axis."""
    import comfy.ldm.wan.vae
    import comfy.sd

    with torch.inference_mode():
        net = comfy.ldm.wan.vae.WanVAE(
            **{"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []},
            **{"temperal_downsample": [False, True, True], "dropout": 0.0},
        )
        tiny_models.randomise(net, 0, gain=1.0)
        return comfy.sd.VAE(sd=net.state_dict())


@functools.cache
def ltxv_vae():
    """LTXV's: 32 x smaller, 128 channels, with a frame axis."""
    import comfy.ldm.lightricks.vae.causal_video_autoencoder as ltxv
    import comfy.sd

    layout = {
        **{"dims": 3, "latent_channels": 128, "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform"},
        "blocks": [*[["compress_all", 1]] * 3, ["res_x", 1]],
    }
    with torch.inference_mode():
        net = ltxv.VideoVAE(config=layout)
        tiny_models.randomise(net, 0, gain=1.0)
        for name, value in net.per_channel_statistics.named_buffers():  # they are read from the file
            value.fill_("std" in name)
        return comfy.sd.VAE(sd=net.state_dict(), metadata={"config": json.dumps({"vae": layout})})


@functools.cache
def flux2_vae():
    """FLUX.2's: 16 x smaller, 128 channels."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    layout = {
        **{"double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32},
        **{"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
        "batch_norm_latent": True,
    }
    params = {"ddconfig": layout, "embed_dim": 32}
    with torch.inference_mode():
        net = AutoencoderKL(**params)
        tiny_models.randomise(net, 0, gain=1.0)
        vae = comfy.sd.VAE(sd=net.state_dict(), config={"params": params})
    vae.downscale_ratio = vae.upscale_ratio = 16
    vae.latent_channels = 128
    return vae
