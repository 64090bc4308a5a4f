"""Sana (Xie et al. 2024, arXiv 2410.10629) as ComfyUI objects: MODEL, CLIP and VAE from a diffusers folder.

ComfyUI does not support Sana. The folder's networks are wrapped in ComfyUI's interfaces, so that stock samplers, LoRA
loaders and all nodes of this pack can use it: a flow model with shifted noise levels, a text encoder, and an
autoencoder with a downscaling of 32. They load fully or not at all, since their layers are not ComfyUI's and cannot be
streamed.
"""

from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...session import folders
from ...session.inputs import Names
from . import diffusers_folder as sana

DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = [torch.bfloat16, torch.float32]  # as in the reference code; Gemma overflows in fp16
LORA_LAYERS = ("to_q", "to_k", "to_v")
INSTRUCTED = "likeness_instruction"  # a tokenizer option
# Measured at the published widths: live values per pixel while an image is encoded or decoded, and values per token and
# channel that a block stores for backward. ComfyUI asks for one pass; the gradient session reserves 4 times as much.
ENCODE_VALUES, DECODE_VALUES, BACKWARD_VALUES, PASSES = 1200, 1350, 30, 4


class SanaLatents(comfy.latent_formats.LatentFormat):
    """Latents of the deep compression autoencoder."""

    def __init__(self, scale_factor: float = 1.0, channels: int = 32, ratio: int = 32) -> None:
        self.scale_factor, self.latent_channels = scale_factor, channels
        self.spacial_downscale_ratio = ratio  # read by newer ComfyUI (with this spelling)


class Sana(comfy.supported_models_base.BASE):
    """The model configuration that ComfyUI expects for a model family."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    latent_format = SanaLatents
    supported_inference_dtypes = PRECISIONS


class SanaModel(comfy.model_base.HiDream):
    """The flow model. It derives from HiDream only because ComfyUI accepts diffusers' LoRA names ("transformer....")
    for certain classes, and for HiDream, as here, they are the names in the network.
    """

    def __init__(self, config: Sana, network: nn.Module) -> None:
        comfy.model_base.BaseModel.__init__(self, config, comfy.model_base.ModelType.FLOW)
        self.diffusion_model = network.train(False)

    def memory_required(self, input_shape, cond_shapes=None) -> float:
        """Bytes for one prediction with an input [B, C, h, w]."""
        config: Any = self.diffusion_model.config
        tokens = input_shape[0] * input_shape[2] * input_shape[3] / config.patch_size**2
        width = config.num_attention_heads * config.attention_head_dim
        return BACKWARD_VALUES / PASSES * tokens * width * config.num_layers * mm.dtype_size(self.get_dtype())

    def lora_layers(self) -> dict[str, nn.Module]:
        """The layers that SISO's script trains for Sana, by their names in diffusers' files."""
        parts = self.diffusion_model.named_modules()
        return {f"transformer.{path}": part for path, part in parts if path.endswith(LORA_LAYERS)}

    extra_conds = comfy.model_base.BaseModel.extra_conds
    encode_adm = comfy.model_base.BaseModel.encode_adm


class FullLoadPatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher that loads and unloads a network only as a whole."""

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=True) -> None:
        super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        return 0  # nothing freed, so ComfyUI unloads the model fully


class SanaTokenizer:
    """The tokenizer with the interface of ComfyUI's CLIP. Prompt weights, "(word:1.2)", are plain text to Gemma.

    instruction: prepended to every non-empty prompt, as in the reference code.
    """

    def __init__(self, tokenizer: Any, instruction: str) -> None:
        self._tokenizer, self._instruction = tokenizer, instruction
        self._instruction_length = len(tokenizer.encode(instruction))

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, tokenizer_options: dict[str, Any] | None = None, **_more: Any
    ) -> dict[str, list[list[tuple]]]:
        """The token ids, each with weight 1: lower-cased and truncated to 300 tokens after the instruction. Not padded:
        masked tokens can be omitted.
        """
        text, most, end = text.lower().strip(), sana.MAX_TOKENS, (0,) if return_word_ids else ()
        if text and (tokenizer_options or {}).get(INSTRUCTED, True):
            text, most = self._instruction + text, self._instruction_length + most - 2
        return {"gemma2": [[(number, 1.0, *end) for number in self._tokenizer.encode(text)[:most]]]}

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        """Pairs of a token tuple and its text."""
        return [(pair, self._tokenizer.decode([pair[0]])) for pair in pairs]

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing is saved with a model."""
        return {}


def sana_names() -> Names:
    """Folders in models/diffusers that contain Sana."""
    return folders.matching(folders.DIFFUSERS, lambda path: sana.pipeline_of(path) == sana.PIPELINE)


def load_sana(folder: Path, dtype: str = "default", instruction: bool = True) -> tuple[Any, Any, Any, Any]:
    """MODEL, CLIP and VAE of a folder, and the CLIP without the instruction, for a non-empty negative prompt.
    ValueError, before anything large is read, when it has another model, is incomplete or pickled; RuntimeError when
    diffusers is not installed.
    """
    sana.check_folder(folder)
    sana.library(folder)
    model, vae, plain = load_model(folder, dtype), _vae(folder), _clip(folder)
    plain.set_tokenizer_option(INSTRUCTED, False)
    clip = plain.clone()
    clip.set_tokenizer_option(INSTRUCTED, instruction)
    return model, clip, vae, plain


def load_model(folder: Path, dtype: str, **_more: Any) -> Any:
    """The MODEL alone, in one of DTYPES. Newer ComfyUI passes further arguments when it reloads a model."""
    device, model_dtype = mm.get_torch_device(), DTYPES[dtype]
    if model_dtype is None:
        default = mm.unet_dtype(device, supported_dtypes=PRECISIONS)
        model_dtype = default if default in PRECISIONS else torch.float32
    network = sana.load_network(folder, model_dtype)
    config: Any = Sana({"disable_unet_model_creation": True, "dtype": model_dtype})
    config.sampling_settings = {"shift": sana.noise_shift(folder)}
    config.latent_format = SanaLatents(*sana.latent_spec(folder))
    with torch.inference_mode(False):
        model = SanaModel(config, network)
    patcher: Any = FullLoadPatcher(model, load_device=device, offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = (load_model, (folder, dtype))
    return patcher


def _clip(folder: Path) -> Any:
    device = mm.text_encoder_device()
    dtype = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    tokenizer, instruction, encoder = sana.load_text(folder, dtype, mm.intermediate_device())
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model, clip.tokenizer = encoder, SanaTokenizer(tokenizer, instruction)
    clip.patcher = FullLoadPatcher(encoder, load_device=device, offload_device=mm.text_encoder_offload_device())
    clip.patcher.hook_mode, clip.patcher.is_clip = comfy.hooks.EnumHookMode.MinVram, True
    clip.layer_idx, clip.tokenizer_options = None, {}
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    return clip


def _vae(folder: Path) -> Any:
    # Initialise ComfyUI's VAE attributes with a pixel-space model, which has no weights; then replace the network.
    vae: Any = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.vae_dtype = mm.vae_dtype(vae.device, PRECISIONS)
    network = sana.load_autoencoder(folder, vae.vae_dtype)
    vae.first_stage_model, vae.working_dtypes = network, PRECISIONS
    _, vae.latent_channels, ratio = sana.latent_spec(folder)
    vae.upscale_ratio = vae.downscale_ratio = ratio
    vae.memory_used_encode = lambda shape, dtype: ENCODE_VALUES * shape[2] * shape[3] * mm.dtype_size(dtype)
    vae.memory_used_decode = lambda shape, dtype: DECODE_VALUES * shape[2] * shape[3] * ratio**2 * mm.dtype_size(dtype)
    vae.patcher = FullLoadPatcher(network, load_device=vae.device, offload_device=mm.vae_offload_device())
    vae.disable_offload, vae.size = True, None
    return vae
