"""The small world at its trained width, as ComfyUI objects: the function of the wide checkpoint at 1/25 of its cost.

Benchmarks and tests run the pack's real code on these. `comfy` must be importable (inside a server it is; scripts call
`comfyui.prepare()` first).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import assets, autoencoder
from .networks import CONTEXT, TOPOLOGY, TextEncoder, make_unet, token_ids
from .widen import SD15_LATENT_SCALE, Tensors, as_stored, clip_layout, part_of, widen_autoencoder

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


class NarrowVAE:
    """Encode and decode with the conventions of ComfyUI's VAE: pictures [B,H,W,3] in 0..1, latents [B,4,H/8,W/8]."""

    patcher, vae_dtype = None, torch.float32  # what tells one VAE of ComfyUI from another; there is only one of these

    def __init__(self, tensors: Tensors) -> None:
        self.encoder, self.decoder = autoencoder.make_encoder(), autoencoder.make_decoder()
        self.encoder.load_state_dict(part_of(tensors, "encoder."))
        self.decoder.load_state_dict(part_of(tensors, "decoder."))
        self.encoder.train(False).requires_grad_(False)
        self.decoder.train(False).requires_grad_(False)
        self.shift = float(tensors["latent.shift"])
        self.scale = float(tensors["latent.scale"])

    def spacial_compression_encode(self) -> int:
        """Pixels of a latent's side."""
        return 8

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents as the wide VAE gives them."""
        raw = self.encoder(pictures.movedim(-1, 1)[:, :3])
        return (raw - self.shift) / (self.scale * SD15_LATENT_SCALE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, limited to 0..1."""
        raw = latents * (self.scale * SD15_LATENT_SCALE) + self.shift
        return self.decoder(raw).movedim(1, -1).clamp(0, 1)


@dataclass
class NarrowWorld:
    """Everything a graph of the small world uses, narrow."""

    model: ModelPatcher
    text: TextEncoder
    vae: NarrowVAE
    tokenizer: object
    scheduler: str = "ddim_uniform"  # the levels of noise that it is sampled at
    channels: int = autoencoder.CHANNELS

    def conditioning(self, prompt: str) -> list:
        """CONDITIONING of a prompt."""
        return [[self.encode(prompt), {}]]

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """Conditioning tensor [1,77,96] of a prompt, padded as ComfyUI pads SD1.x prompts."""
        return self.text(self.text.rows_of(token_ids(self.tokenizer, [prompt])))


def make_model(tensors: Tensors) -> ModelPatcher:
    """The narrow UNet as a MODEL of ComfyUI's SD15 family."""
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    config = comfy.supported_models.SD15({**TOPOLOGY, "dtype": torch.float32})
    config.custom_operations = comfy.ops.disable_weight_init

    def narrow_unet(device: torch.device | None = None, operations: object = None, **_: object) -> torch.nn.Module:
        return make_unet(operations, device=device)

    base = comfy.model_base.BaseModel(config, unet_model=narrow_unet)
    base.diffusion_model.load_state_dict(part_of(tensors, "unet."))
    base.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(
        base,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_text(assets_dir: str | Path = assets.ASSETS) -> tuple[TextEncoder, object]:
    """The committed text encoder, frozen, and its tokenizer; ComfyUI must be importable."""
    import comfy.sd1_clip
    from transformers import CLIPTokenizer

    stored = assets.read("generator", Path(assets_dir))
    text = TextEncoder(stored["vocabulary"].tolist())
    text.load_state_dict(part_of(as_stored(stored), "text."))
    tokenizer = CLIPTokenizer.from_pretrained(str(Path(inspect.getfile(comfy.sd1_clip)).parent / "sd1_tokenizer"))
    return text.train(False).requires_grad_(False), tokenizer


def load_narrow(assets_dir: str | Path = assets.ASSETS, student: bool = False) -> NarrowWorld:
    """Load the committed generator, or its student of few steps; ComfyUI must be importable."""
    folder = Path(assets_dir)
    tensors = as_stored(assets.read_turbo(folder) if student else assets.read("generator", folder))
    text, tokenizer = load_text(assets_dir)
    scheduler = "simple" if student else NarrowWorld.scheduler
    return NarrowWorld(make_model(tensors), text, NarrowVAE(tensors), tokenizer, scheduler)


def make_clip(tensors: Tensors) -> CLIP:
    """The narrow text encoder as ComfyUI's own CLIP of SD1.x."""
    import comfy.sd
    import comfy.sd1_clip

    target = type(
        "Narrow", (), {"params": {}, "clip": comfy.sd1_clip.SD1ClipModel, "tokenizer": comfy.sd1_clip.SD1Tokenizer}
    )
    config = {"hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT}
    clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": config, "dtype": torch.float32})
    clip.cond_stage_model.clip_l.transformer.load_state_dict(
        clip_layout(part_of(tensors, "text."), tensors["vocabulary"].tolist()), strict=False
    )
    return clip


def make_vae(tensors: Tensors) -> VAE:
    """The narrow autoencoder as ComfyUI's own VAE of TAESD's layout."""
    import comfy.sd

    parts = {key: value for key, value in tensors.items() if key.startswith(("encoder.", "decoder."))}
    vae = comfy.sd.VAE(widen_autoencoder(parts, float(tensors["latent.shift"]), float(tensors["latent.scale"])))
    narrow = NarrowVAE(tensors)
    vae.first_stage_model.taesd_encoder, vae.first_stage_model.taesd_decoder = narrow.encoder, narrow.decoder
    return vae


def load_stock(student: bool = False) -> tuple[ModelPatcher, CLIP, VAE]:
    """What ComfyUI's loader gives of the wide checkpoint, at the trained width."""
    generator = assets.read("generator")
    tensors = as_stored(assets.read_turbo() if student else generator) | {"vocabulary": generator["vocabulary"]}
    return make_model(tensors), make_clip(tensors), make_vae(tensors)
