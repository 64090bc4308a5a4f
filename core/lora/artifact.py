"""The artifact of a fine-tuning: weights under ComfyUI's LoRA names, with the metadata needed to use them correctly.

It is a plain dict of tensors, so every stock LoRA node accepts it: low-rank factors ("<path>.lora_up.weight",
"<path>.lora_down.weight", "<path>.alpha", or PEFT's "<path>.lora_B.weight", "<path>.lora_A.weight"), Kronecker factors
("<path>.lokr_w1", "<path>.lokr_w2") or differences of full weights ("<path>.diff", "<path>.diff_b"). Paths are
ComfyUI's, those of common training scripts ("lora_unet_...", "lora_te_..."), or diffusers' ("transformer....",
"text_encoder...."). An extra tensor ("likeness.needs_...") marks a further requirement, such as a position map, without
which the weights misbehave; stock nodes log its name as not loaded, which is the right warning.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import FORMAT, MAX_TEXT, MAX_WORD, check_header, is_number, read_tensors, read_weights, write_tensors

KIND = "fine_tune"
MAX_BYTES = 24 << 30  # differences of all weights of SDXL with both text encoders, in float32
MAX_SETTINGS = 64  # entries in a header
OFFICIAL_MARKER = "head_position_encode._float_tensor"  # in the reference code's patch-trained checkpoints
MODEL_PREFIXES = ("diffusion_model.", "lora_unet_", "transformer.")  # name prefixes of the tensors of each part
TEXT_PREFIXES = ("text_encoders.", "lora_te", "text_encoder.")
KEY = (
    r"(diffusion_model\.|text_encoders\.|lora_unet_|lora_te[12]?_|transformer\.|text_encoder\.)[\w.]{1,300}"
    r"\.(lora_up\.weight|lora_down\.weight|lora_A\.weight|lora_B\.weight|alpha|diff|diff_b|lokr_w[12])"
)
OTHERS = ("lora_unet_", "lora_te", "transformer.", "text_encoder.")  # prefixes that other programs' LoRAs use too
PAIRS = (("lora_up", "lora_down"), ("lora_B", "lora_A"))
ENDS = {"weight": "diff", "bias": "diff_b"}


class FineTunedWeights(dict[str, Tensor]):
    """Named tensors on the CPU, and a header: method, base, prompt, settings, losses (JSON values)."""

    def __init__(self, tensors: dict[str, Tensor], header: dict[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.header: dict[str, Any] = dict(header or {})

    @property
    def prompt(self) -> str:
        """The training prompt; empty when it is not recorded."""
        return self.header.get("prompt", "")

    @property
    def full(self) -> bool:
        """Whether it holds differences of full weights."""
        return any(name.endswith((".diff", ".diff_b")) for name in self)

    def part(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors of the diffusion model (MODEL_PREFIXES) or of the text encoder (TEXT_PREFIXES)."""
        return {name: value for name, value in self.items() if name.startswith(prefixes)}

    def describe(self, *needs: str) -> str:
        base, settings = self.header.get("base", {}), self.header.get("settings", {})
        downs = (value for name, value in self.items() if name.endswith((".lora_down.weight", ".lora_A.weight")))
        rank = next((value.shape[0] for value in downs), 0)
        what = "all weights (differences)" if self.full else f"LoRA of rank {rank}"
        what = "LoKr" if any(name.endswith(".lokr_w1") for name in self) else what
        parts = "UNet and text encoder" if self.part(TEXT_PREFIXES) else "UNet"
        lines = [
            f"{self.header.get('method', 'unknown method')}: {what} of the {parts}",
            f"base model: {base.get('family', 'not recorded')} ({base.get('prediction', 'prediction not recorded')})",
            f"training prompt: {self.prompt or 'not recorded'}",
            *needs,
        ]
        if settings:
            lines.append(", ".join(f"{name} {value}" for name, value in sorted(settings.items())))
        losses = self.header.get("losses") or []
        if losses:
            lines.append(f"loss: first {losses[0]:.4f}, last {losses[-1]:.4f}")
        return "\n".join(lines)


def weight_differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """after - before for all weights that changed, in float16; differences that are zero in float16 are dropped.

    Names: "<path>.weight" becomes "<path>.diff", "<path>.bias" becomes "<path>.diff_b", as in LoRA files.
    """
    differences = {}
    for name, value in after.items():
        difference = (value.detach().float().cpu() - before[name].float().cpu()).to(torch.float16)
        path, _, end = name.rpartition(".")
        if bool(difference.any()):
            differences[f"{path}.{ENDS[end]}" if end in ENDS else f"{name}.diff"] = difference
    return differences


def save_fine_tune(path: Path, tuned: FineTunedWeights, *, replace: bool = True) -> None:
    write_tensors(path, tuned, {**tuned.header, "format": FORMAT, "kind": KIND}, replace=replace)


def read_fine_tune(path: Path, needs: Collection[str] = ()) -> FineTunedWeights:
    """Read a file of this pack, or one that the stock Save LoRA node wrote from our LORA_MODEL (without a header);
    ValueError for anything else. needs: the names of further tensors that the caller handles.
    """
    if path.suffix.lower() != ".safetensors":
        try:
            names = list(read_weights(path, MAX_BYTES))
        except ValueError:  # whatever the file is, the error below is the same
            names = []
        _refuse_official(path, names)
        raise ValueError(f"{path.name} is not a .safetensors file: choose one made by Save Fine-Tune.")

    def check(names: list[str]) -> list[str]:
        _refuse_official(path, names)
        if not set(names) - set(needs):
            raise ValueError(f"{path.name} holds nothing (it is empty): choose a file made by Save Fine-Tune.")
        _refuse_foreign(path, [name for name in names if name not in needs and not re.fullmatch(KEY, name)])
        return names

    tensors, header = read_tensors(path, MAX_BYTES, check)
    if header:
        check_header(path, header, KIND, "a fine-tune of this pack: choose one made by Save Fine-Tune")
        prompt = header.get("prompt", "")
        checks = (
            isinstance(prompt, str) and len(prompt) <= MAX_TEXT and not re.search("[\ud800-\udfff]", prompt),
            _plain(header.get("settings", {}), (str, bool, int, float)),
            _plain(header.get("base", {}), (str,)),
        )
        if not all(checks):
            raise ValueError(f"{path.name} has a damaged header: copy or train it again.")
    else:  # saved by a stock node
        _refuse_foreign(path, [name for name in tensors if name.startswith(OTHERS)])
    for name, value in tensors.items():
        sizes: dict[str, tuple[int, ...]] = {"alpha": (0,), ".lokr_w1": (2,), ".lokr_w2": (2,)}
        sizes |= {f"{side}.weight": (2, 4) for pair in PAIRS for side in pair}
        allowed = next((dims for end, dims in sizes.items() if name.endswith(end)), None)
        if not value.is_floating_point() or allowed is not None and value.ndim not in allowed:
            raise ValueError(f"{path.name} holds an unexpected tensor '{name}' {tuple(value.shape)}: train it again.")
    _check_pairs(path, tensors)
    return FineTunedWeights(tensors, header)


def _refuse_foreign(path: Path, foreign: list[str]) -> None:
    if foreign:
        raise ValueError(
            f"{path.name} is a safetensors file but not a fine-tune of this pack (such as '{foreign[0][:80]}'): choose "
            "one made by Save Fine-Tune; other LoRAs belong in the stock Load LoRA node."
        )


def _refuse_official(path: Path, names: list[str]) -> None:
    if any(name.endswith(OFFICIAL_MARKER) for name in names):
        raise ValueError(
            f"{path.name} is a whole checkpoint that the SINE authors' script trained on patches: put it into "
            "models/checkpoints, load it with Load Checkpoint, and send its model through Position Map (128 cells, "
            "bilinear for photos, nearest for paintings)."
        )


def _plain(table: dict[str, Any], kinds: tuple[type, ...]) -> bool:
    """Whether this is a short dict of short values of these types: it is displayed as it is."""
    return (
        len(table) <= MAX_SETTINGS
        and all(isinstance(value, kinds) for value in table.values())
        and all(is_number(value) for value in table.values() if not isinstance(value, str))
        and all(len(str(part)) <= MAX_WORD for item in table.items() for part in item)
    )


def _check_pairs(path: Path, tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith((".lokr_w1", ".lokr_w2")) and f"{name[:-1]}{3 - int(name[-1])}" not in tensors:
            raise ValueError(f"{path.name} holds no matching pair of factors for '{name[:-8]}': train it again.")
        layer, _, part = name.rpartition(".lora_")
        if not layer:
            continue
        names = next(pair for pair in PAIRS if f"lora_{part.partition('.')[0]}" in pair)
        up, down = (tensors.get(f"{layer}.{side}.weight") for side in names)
        if up is None or down is None or up.shape[1] != down.shape[0] or not up.numel() or not down.numel():
            raise ValueError(f"{path.name} holds no matching pair of factors for '{layer}': train it again.")
