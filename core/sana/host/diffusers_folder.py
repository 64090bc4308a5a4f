"""A diffusers folder of Sana (Xie et al. 2024, arXiv 2410.10629) -> its networks. Read from disk only, never a pickle.

The layers are those of the diffusers and transformers packages, under the names that the folder has for them: so a LoRA
made on them is diffusers' own, and no weight is stored twice.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...vision.host.extras.install import missing_package
from ...vision.host.extras.offline import offline, reason
from ...vision.host.extras.transformers_folder import check_complete, read_model

PIPELINE = "SanaPipeline"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
SOURCE = "the Sana_1600M_512px_diffusers folder of huggingface.co/Efficient-Large-Model"
NETWORK, AUTOENCODER = "SanaTransformer2DModel", "AutoencoderDC"
WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"
VARIANTS = (None, "bf16", "fp16")  # of the weights' files, in the order in which they are taken
MAX_TOKENS = 300  # of the prompt, after the instruction (the paper, 3.1); SISO's script cuts at 256
SHIFT = 3.0  # of the noise levels, where the folder does not tell


def pipeline_of(folder: Path) -> str:
    """The class that model_index.json names; empty when it cannot be read."""
    try:
        return str(_table(folder / "model_index.json").get("_class_name", ""))
    except ValueError:
        return ""


def check_folder(folder: Path) -> None:
    """ValueError with the remedy when the folder is another model's or incomplete, before anything large is read."""
    name = pipeline_of(folder)
    if name != PIPELINE:
        raise ValueError(
            f"The folder {folder.name} holds {name or 'no pipeline that can be told'}, expected is a {PIPELINE}: "
            f"put {SOURCE} into models/diffusers."
        )
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"The folder {folder.name} has no folder {part}: copy {SOURCE} whole.")
    for part, kind in (("transformer", NETWORK), ("vae", AUTOENCODER)):
        found = _table(folder / part / "config.json").get("_class_name")
        if found != kind:
            raise ValueError(f"{folder.name}/{part} holds {found}, expected is {kind}: copy {SOURCE} whole.")
    if _table(folder / "transformer" / "config.json").get("guidance_embeds"):
        raise ValueError(
            f"The folder {folder.name} is of the Sana-Sprint family, which takes its guidance as an input: use "
            f"{SOURCE}."
        )


def library(folder: Path) -> Any:
    """The diffusers package. RuntimeError with the remedy when it is not installed or too old."""
    try:
        import diffusers

        for name in (NETWORK, AUTOENCODER, PIPELINE):
            getattr(diffusers, name)  # it is imported now
    except (ImportError, AttributeError, RuntimeError) as error:
        why = f"0.35 or newer; {reason(error)}"
        raise missing_package(folder.name, "diffusers", why, "-U diffusers") from error
    return diffusers


def load_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer, called as ComfyUI calls its own."""
    library(folder)
    return _read(folder / "transformer", _network_class(), dtype)


def load_autoencoder(folder: Path, dtype: torch.dtype) -> Autoencoder:
    """The deep compression autoencoder."""
    return Autoencoder(_read(folder / "vae", getattr(library(folder), AUTOENCODER), dtype))


def load_text(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Words, Gemma]:
    """The tokenizer, and the text encoder that it belongs to."""
    import transformers
    from diffusers import SanaPipeline

    part = folder / "text_encoder"
    model, missing = read_model(part, "AutoModel", dtype, _variant(part, TEXT_WEIGHTS))
    check_complete(part, missing)
    with offline():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder / "tokenizer"), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for a damaged folder
            raise ValueError(
                f"The tokenizer of {folder.name} could not be loaded ({reason(error)}): copy the folder again."
            ) from error
        lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        words = Words(tokenizer, "\n".join(lines))
    return words, Gemma(model, words.instruction_ids, device)


def noise_shift(folder: Path) -> float:
    """How the scheduler of the folder shifts its noise levels, whichever scheduler that is."""
    path = folder / "scheduler" / "scheduler_config.json"
    table = _table(path) if path.is_file() else {}
    value = table.get("flow_shift", table.get("shift", SHIFT))
    return float(value) if isinstance(value, (int, float)) and value > 0 else SHIFT


def samples(folder: Path) -> tuple[float, int, int]:
    """Scale of the autoencoder's samples, their channels, and how many times smaller than images they are."""
    table = _table(folder / "vae" / "config.json")
    try:
        levels = len(table["encoder_block_out_channels"])
        return float(table["scaling_factor"]), int(table["latent_channels"]), 2 ** (levels - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.json of {folder.name}/vae lacks an entry ({reason(error)}): copy {SOURCE} whole."
        ) from error


class Words:
    """Prompts as token ids. instruction: what is put before every prompt that is not empty, as published."""

    def __init__(self, tokenizer: Any, instruction: str) -> None:
        self._tokenizer, self._instruction = tokenizer, instruction
        self.instruction_ids: list[int] = tokenizer.encode(instruction)

    def ids(self, text: str, instructed: bool) -> list[int]:
        """Lower case, cut at 300 tokens of the prompt's own. Never padded: what a mask hides need not be there."""
        text = text.lower().strip()
        if not instructed or not text:
            return self._tokenizer.encode(text)[:MAX_TOKENS]
        return self._tokenizer.encode(self._instruction + text)[: len(self.instruction_ids) + MAX_TOKENS - 2]

    def untokenized(self, ids: Sequence[int]) -> list[str]:
        """The pieces of text that ids stand for."""
        return [self._tokenizer.decode([number]) for number in ids]


class Gemma(nn.Module):
    """The text encoder: rows of the last layer. dtypes and the methods are those that ComfyUI's CLIP calls."""

    def __init__(self, model: Any, instruction_ids: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.model, self._instruction_ids, self._device = model, list(instruction_ids), device
        self.dtypes = {next(model.parameters()).dtype}

    def reset_clip_options(self) -> None:
        """Nothing to reset: the published rows are always those of the last layer."""

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """See reset_clip_options()."""

    def encode_token_weights(self, tokens: dict[str, list[list[Any]]]) -> tuple[Tensor, None]:
        """Rows [1, N, width] of token ids. The instruction's rows are dropped except for the first (paper, 3.1).

        The reference pads to a fixed length and hides the padding by a mask. A causal encoder's rows do not depend on
        what follows, and hidden rows do not count in cross attention: leaving them out is the same.
        """
        ids = [entry[0] for entry in next(iter(tokens.values()))[0]]
        hidden = self.model(torch.tensor([ids], device=next(self.model.parameters()).device))[0]
        known = len(self._instruction_ids) - 1  # its last token may have merged with the prompt's first
        instructed = len(ids) > known and ids[:known] == self._instruction_ids[:known]
        rows = torch.cat([hidden[:, :1], hidden[:, known:]], 1) if instructed else hidden
        return rows.float().to(self._device), None


class Autoencoder(nn.Module):
    """encode and decode as ComfyUI's VAE calls them; images [B, 3, H, W] in -1..1."""

    def __init__(self, dc: Any) -> None:
        super().__init__()
        self.dc = dc

    def encode(self, pixels: Tensor, **_more: Any) -> Tensor:
        """Samples [B, C, H / 32, W / 32], not scaled."""
        return self.dc.encode(pixels, return_dict=False)[0]

    def decode(self, samples: Tensor, **_more: Any) -> Tensor:
        """The images of samples."""
        return self.dc.decode(samples, return_dict=False)[0]


@functools.cache
def _network_class() -> type:
    import diffusers

    base: Any = diffusers.SanaTransformer2DModel

    class SanaNetwork(base):
        """diffusers' transformer behind ComfyUI's call. A subclass, so that all weights keep diffusers' names."""

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
            moment = timesteps * self.config.get("timestep_scale", 1.0)  # older diffusers has none
            out = super().forward(x, context, moment, return_dict=False)[0]
            return out[:, : x.shape[1]]  # some have the variance behind it

    return SanaNetwork


def _read(part: Path, kind: Any, dtype: torch.dtype) -> Any:
    """A network of diffusers, complete and frozen, in a precision."""
    from diffusers.utils import is_accelerate_available

    variant = _variant(part, WEIGHTS)
    with offline():
        try:
            model, info = kind.from_pretrained(
                str(part),
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                torch_dtype=dtype,
                low_cpu_mem_usage=is_accelerate_available(),  # it says so when it cannot
                output_loading_info=True,
            )
        except Exception as error:  # diffusers raises many kinds for a damaged folder
            raise ValueError(
                f"The folder {part.parent.name}/{part.name} could not be loaded by diffusers ({reason(error)}): check "
                "that config.json and the weights belong together and are complete."
            ) from error
    check_complete(part, set(info["missing_keys"]))
    return model.eval().requires_grad_(False)


def _variant(part: Path, base: str) -> str | None:
    """Which of the weights' files a folder has. ValueError when it has none, or pickles alone."""
    for variant in VARIANTS:
        middle = "" if variant is None else f".{variant}"
        if (part / f"{base}{middle}.safetensors").is_file() or (
            part / f"{base}.safetensors.index{middle}.json"
        ).is_file():
            return variant
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in part.glob(suffix))
    given = f"has its weights as {pickles[0]}, a pickle, which can run code" if pickles else "has no weights"
    raise ValueError(f"The folder {part.parent.name}/{part.name} {given}: put its {base}*.safetensors there.")


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name} of {path.parent.name} cannot be read ({reason(error)}): copy the folder again."
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} of {path.parent.name} is not a table of settings: copy the folder again.")
    return table
