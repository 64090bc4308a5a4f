"""A diffusers folder of Sana (Xie et al. 2024, arXiv 2410.10629) -> its networks. Read from disk only, never a pickle.

The layers are those of the diffusers and transformers packages, with the folder's own weight names: a LoRA trained on
them is in diffusers' format, and no weight is stored twice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...files import is_number, read_table
from ...vision.host.extras.offline import missing_package, reason, running, weights_variant
from ...vision.host.extras.settings import check_size
from ...vision.host.extras.transformers_folder import check_complete, pretrained, read_model, read_processor

PIPELINE = "SanaPipeline"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
SOURCE = "the Sana_1600M_512px_diffusers folder of huggingface.co/Efficient-Large-Model"
NETWORK, AUTOENCODER = "SanaTransformer2DModel", "AutoencoderDC"
WEIGHTS = "diffusion_pytorch_model"
VARIANTS = (None, "bf16", "fp16")  # of the weight files, in order of preference
MAX_TOKENS = 300  # of the prompt, after the instruction (paper, 3.1); SISO's script truncates at 256
MAX_CHANNELS = 4096  # of latents; Sana has 32
SHIFT = 3.0  # default shift of the noise levels, if the folder specifies none


def pipeline_of(folder: Path) -> str:
    """The pipeline class in model_index.json; empty when it cannot be read."""
    try:
        return str(read_table(folder / "model_index.json").get("_class_name", ""))
    except ValueError:
        return ""


def check_folder(folder: Path) -> None:
    """ValueError with the remedy when the folder has another model or is incomplete, before anything large is read."""
    name = pipeline_of(folder)
    if name != PIPELINE:
        raise ValueError(
            f"The folder {folder.name} holds {name or 'no recognisable pipeline'}, expected a {PIPELINE}: "
            f"put {SOURCE} into models/diffusers."
        )
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"The folder {folder.name} has no folder {part}: copy {SOURCE} whole.")
    for part, kind in (("transformer", NETWORK), ("vae", AUTOENCODER)):
        class_name = read_table(folder / part / "config.json").get("_class_name")
        if class_name != kind:
            raise ValueError(f"{folder.name}/{part} holds {class_name}, expected {kind}: copy {SOURCE} whole.")
    if read_table(folder / "transformer" / "config.json").get("guidance_embeds"):
        raise ValueError(
            f"The folder {folder.name} is of the Sana-Sprint family, which takes its guidance as an input: use "
            f"{SOURCE}."
        )


def library(folder: Path) -> Any:
    """The diffusers package. RuntimeError with the remedy when it is not installed or too old."""
    try:
        import diffusers

        for name in (NETWORK, AUTOENCODER, PIPELINE):
            getattr(diffusers, name)  # imported lazily, on access
    except (ImportError, AttributeError, RuntimeError) as error:
        why = f"0.35 or newer; {reason(error)}"
        raise missing_package(folder.name, "diffusers", why, "-U diffusers") from error
    return diffusers


def load_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer, with the call signature of ComfyUI's own models."""
    return _read(folder / "transformer", _network_class(), dtype)


def load_autoencoder(folder: Path, dtype: torch.dtype) -> Autoencoder:
    return Autoencoder(_read(folder / "vae", getattr(library(folder), AUTOENCODER), dtype))


def load_text(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, str, Gemma]:
    """The tokenizer, the instruction that the reference code puts before a prompt, and the text encoder."""
    from diffusers import SanaPipeline

    part = folder / "text_encoder"
    model, _ = read_model(part, "AutoModel", dtype, weights_variant(part, variants=VARIANTS))
    tokenizer = read_processor(folder / "tokenizer", "AutoTokenizer")
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(lines)
    with running(f"The tokenizer of {folder.name}"):
        tokens = tokenizer.encode(instruction)
    return tokenizer, instruction, Gemma(model, tokens, device)


def noise_shift(folder: Path) -> float:
    """The shift of the noise levels in the folder's scheduler config, for any scheduler."""
    path = folder / "scheduler" / "scheduler_config.json"
    table = read_table(path) if path.is_file() else {}
    value = next((table[name] for name in ("flow_shift", "shift") if table.get(name) is not None), SHIFT)
    if not is_number(value) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"The shift of {folder.name} is {ascii(value)[:60]}, expected above 0: copy {SOURCE} whole.")
    return float(value)


def latent_spec(folder: Path) -> tuple[float, int, int]:
    """Scaling factor and channels of the autoencoder's latents, and their downscaling relative to images."""
    table = read_table(folder / "vae" / "config.json")
    try:
        levels = len(table["encoder_block_out_channels"])
        scale, channels = float(table["scaling_factor"]), int(table["latent_channels"])
        if not (is_number(scale) and scale > 0 and 0 < channels <= MAX_CHANNELS):
            raise ValueError(f"scaling_factor {scale}, latent_channels {channels}")
        return scale, channels, 2 ** (levels - 1)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"config.json of {folder.name}/vae lacks an entry, or has a wrong one ({reason(error)}): copy {SOURCE} "
            "whole."
        ) from error


class Gemma(nn.Module):
    """The text encoder, whose output is the last layer's token embeddings, with the interface of ComfyUI's CLIP."""

    def __init__(self, model: Any, instruction_ids: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.model, self._instruction_ids, self._device = model, list(instruction_ids), device
        self.dtypes = {next(model.parameters()).dtype}

    def reset_clip_options(self) -> None:
        """Nothing to reset: as in the reference code, the output is always the last layer's."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See reset_clip_options()."""

    def encode_token_weights(self, tokens: dict[str, list[list[Any]]]) -> tuple[Tensor, None]:
        """Token embeddings [1, N, width] of token ids, without the instruction's except for the first (paper, 3.1).

        The reference code pads to a fixed length and masks the padding. In a causal encoder a token's embedding does
        not depend on later tokens, and masked tokens have no effect in cross attention: omitting them is equivalent.
        """
        ids = [entry[0] for entry in next(iter(tokens.values()))[0]]
        with running("Sana's text encoder"):
            hidden = self.model(torch.tensor([ids], device=next(self.model.parameters()).device))[0]
        length = len(self._instruction_ids) - 1  # the instruction's last token may merge with the prompt's first
        instructed = len(ids) > length and ids[:length] == self._instruction_ids[:length]
        context = torch.cat([hidden[:, :1], hidden[:, length:]], 1) if instructed else hidden
        return context.float().to(self._device), None


class Autoencoder(nn.Module):
    """encode() and decode() with the signatures that ComfyUI's VAE expects; images [B, 3, H, W] in -1..1."""

    def __init__(self, dc: Any) -> None:
        super().__init__()
        self.dc = dc

    def encode(self, pixels: Tensor, **_more: Any) -> Tensor:
        """Latents [B, C, H / 32, W / 32], not scaled."""
        return self.dc.encode(pixels, return_dict=False)[0]

    def decode(self, samples: Tensor, **_more: Any) -> Tensor:
        return self.dc.decode(samples, return_dict=False)[0]


@functools.cache
def _network_class() -> type:
    import diffusers

    base: Any = diffusers.SanaTransformer2DModel

    class SanaNetwork(base):
        """diffusers' transformer with ComfyUI's call signature; a subclass, so that weights keep diffusers' names."""

        def forward(
            self,
            x: Tensor,
            timesteps: Tensor,
            context: Tensor | None = None,
            transformer_options: dict[str, Any] | None = None,
            **more: Any,
        ) -> Tensor:
            """x [B, C, h, w], timesteps [B] in 0..1000, context [B, N, width] -> velocity like x."""
            options = transformer_options or {}
            wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
            run = WrapperExecutor.new_class_executor(self._predict, self, wrappers)
            return run.execute(x, timesteps, context, transformer_options=options, **more)

        def _predict(self, x: Tensor, timesteps: Tensor, context: Tensor, **_more: Any) -> Tensor:
            mm.throw_exception_if_processing_interrupted()
            scaled = timesteps * self.config.get("timestep_scale", 1.0)  # absent in older diffusers
            out = super().forward(x, context, scaled, return_dict=False)[0]
            return out[:, : x.shape[1]]  # some models append the variance

    return SanaNetwork


def _read(part: Path, kind: Any, dtype: torch.dtype) -> Any:
    """A diffusers network, frozen, in the given dtype. ValueError when it is incomplete, or, before it is built, for a
    config.json with values of another kind than the network's own defaults, or of a much larger network than its files
    hold.
    """
    from diffusers.utils import is_accelerate_available

    variant = weights_variant(part, WEIGHTS, VARIANTS)
    config, known = read_table(part / "config.json"), inspect.signature(kind.__init__).parameters
    where = f"config.json of {part.parent.name}/{part.name}"
    for name in known.keys() & {name for name, value in config.items() if value is not None}:
        value, default = config[name], known[name].default
        number = is_number(value) and not isinstance(value, bool)
        fits, expected = True, ""
        if isinstance(default, bool):
            fits, expected = isinstance(value, bool), "true or false"
        elif number or is_number(default):
            fits, expected = number and (value > 0 or value == default), "a number above 0"
        if not fits:
            raise ValueError(f"{where} has {ascii(value)[:60]} as {name}, expected {expected}: copy {SOURCE} whole.")
    check_size(where, config, [*part.glob("*.safetensors")], lambda: kind.from_config(config))
    memory = {"low_cpu_mem_usage": is_accelerate_available()}  # diffusers logs a warning if it cannot
    model, info = pretrained(kind, part, "diffusers", variant=variant, torch_dtype=dtype, **memory)
    check_complete(part, set(info["missing_keys"]), set(info["unexpected_keys"]))
    return model.train(False).requires_grad_(False)
