"""Files of EZIGen's adapter: our own, and the published checkpoint in all its layouts.

A published checkpoint is the folder of a training run: the whole UNet of 3.7 GB including the adapter, sometimes with a
second file for w, sometimes with names that begin with "module.". The adapter is 113 of these tensors, 5 % of the
bytes; they keep their published names in our files.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import FORMAT, check_header, is_number, read_tensors, read_weights, write_tensors
from .adapter import WEIGHTS, Adapter

log = logging.getLogger("likeness")
KIND = "adapter"
MAX_BYTES = 8 << 30
MARKERS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
SECONDS = ("model_1.safetensors", "pytorch_model_1.bin")  # the file of w in older checkpoints
BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+"
PARTS = ("adapter.to_q.weight", "adapter.to_k.weight", "adapter.to_v.weight", "adapter.to_out.0.weight",
         "adapter.to_out.0.bias", "adapter_norm.weight", "adapter_norm.bias")  # fmt: skip
NAME = rf"(?:^|\.)({BLOCK}\.(?:{'|'.join(map(re.escape, PARTS))}))$"
BASE = rf"(?:^|\.)({BLOCK}\.attn1\.to_q\.weight)$"
BASE_PART = ".attn1.to_q.weight"
SAMPLED = 32  # values of each of the base's sampled weights


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter's tensors by published names, and its header, whose "base" has the first values of some of the UNet's
    weights, by published name, which identify the base model.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)

    def order(self) -> list[str]:
        """Its layers in execution order."""
        return sort_layers({name.partition(".adapter")[0] for name in self.tensors if name != WEIGHTS})

    def widths(self) -> list[int]:
        return [self.tensors[f"{name}.{PARTS[0]}"].shape[0] for name in self.order()]

    def describe(self) -> str:
        count = sum(value.numel() for value in self.tensors.values())
        kinds = "/".join(str(width) for width in dict.fromkeys(self.widths()))
        line = f"{len(self.tensors)} tensors, {count:,} numbers, {len(self.order())} blocks of widths {kinds}"
        steps = self.header.get("steps")
        return line + (f", {steps} steps" if steps else "")


def sort_layers(layers: Iterable[str]) -> list[str]:
    """Sort layer names in the UNet's execution order."""
    parts = ("down", "mid", "up")
    return sorted(
        layers, key=lambda name: (parts.index(name[: name.index("_")]), *map(int, re.findall(r"\.(\d+)", name)))
    )


def read_adapter(path: Path) -> StoredAdapter:
    """Read our file, or a published checkpoint: a file, or the folder of a training run.

    ValueError, with the remedy, when it holds no complete adapter.
    """
    tensors: dict[str, Tensor] = {}
    base: dict[str, list[float]] = {}
    header: dict[str, Any] = {}
    for file in _files(path):
        contents, file_header = _read(file)
        header = header or file_header
        for name, value in contents.items():
            if match := re.search(NAME, name):
                tensors[match[1]] = value
            elif base_match := re.search(BASE, name):
                base[base_match[1]] = value.flatten()[:SAMPLED].float().tolist()
            elif name.rpartition(".")[2] == WEIGHTS:
                tensors[WEIGHTS] = value
    layers = StoredAdapter(tensors).order()
    if WEIGHTS not in tensors and layers:
        log.warning("%s has no %s: they are taken as 1, where training began.", path.name, WEIGHTS)
        tensors[WEIGHTS] = torch.ones(len(layers))
    _check_tensors(path, layers, tensors)
    if header:
        _check_header(path, header, layers)
    else:
        sample = sorted(base)[:: max(1, len(base) // 4)]
        header = {"kind": KIND, "format": FORMAT, "base": {name: base[name] for name in sample}, "from": path.name}
    return StoredAdapter(tensors, header)


def pack_adapter(adapter: Adapter, header: dict[str, Any]) -> StoredAdapter:
    tensors = {name: value.detach().float().cpu().clone() for name, value in adapter.published_parameters().items()}
    return StoredAdapter(tensors, header)


def base_sample(layers: Sequence[str], weight: Callable[[str], Tensor]) -> dict[str, list[float]]:
    """The header entry that identifies the UNet of a training; weight(layer) returns its attn1.to_q.weight."""
    sample = layers[:: max(1, len(layers) // 4)]
    return {name + BASE_PART: weight(name).flatten()[:SAMPLED].float().tolist() for name in sample}


def save_adapter(path: Path, adapter: StoredAdapter, dtype: torch.dtype | None = None, *, replace: bool = True) -> None:
    """Save as one safetensors file, in dtype if given; w stays float32."""
    tensors = {
        name: value.to(torch.float32 if name == WEIGHTS else dtype or value.dtype)
        for name, value in adapter.tensors.items()
    }
    write_tensors(path, tensors, {**adapter.header, "kind": KIND, "format": FORMAT}, replace=replace)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = [path / name for name in MARKERS if (path / name).is_file()][:1]
    files += [path / name for name in SECONDS if (path / name).is_file()][:1]
    if not files:
        raise ValueError(
            f"{path.name} has none of {', '.join(MARKERS)}: choose the checkpoint's folder, such as "
            "checkpoint-200000, or one of its files."
        )
    return files


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The relevant tensors of one file, and our header if it has one."""

    def choose(names: list[str]) -> list[str]:
        return [name for name in names if re.search(f"{NAME}|{BASE}", name) or name.rpartition(".")[2] == WEIGHTS]

    if path.suffix.lower() == ".safetensors":
        return read_tensors(path, MAX_BYTES, choose)
    return {name: value.clone() for name, value in read_weights(path, MAX_BYTES, choose).items()}, {}


def _check_header(path: Path, header: dict[str, Any], layers: list[str]) -> None:
    check_header(path, header, KIND, "an adapter: choose a file of Extract Adapter or Train Adapter")
    base = header.get("base", {})
    valid = isinstance(base, dict) and all(
        name.removesuffix(BASE_PART) in layers and isinstance(row, list) and 0 < len(row) <= SAMPLED
        and all(map(is_number, row))
        for name, row in base.items()
    )  # fmt: skip
    if not valid or not isinstance(header.get("steps", 0), int):
        raise ValueError(f"{path.name} has a damaged header: copy or extract it again.")


def _check_tensors(path: Path, layers: list[str], tensors: dict[str, Tensor]) -> None:
    if not layers:
        raise ValueError(
            f"{path.name} holds no adapter (tensors named '....adapter.to_q.weight'): choose the authors' checkpoint, "
            "or a file of Extract Adapter."
        )
    missing = [f"{layer}.{part}" for layer in layers for part in PARTS if f"{layer}.{part}" not in tensors]
    if missing:
        raise ValueError(f"{path.name} lacks '{missing[0]}' of its adapter: copy or download it again.")
    shapes: dict[str, tuple[int, ...]] = {WEIGHTS: (len(layers),)}
    for layer in layers:
        width = next(iter(tensors[f"{layer}.{PARTS[0]}"].shape), 1)
        shapes |= {f"{layer}.{part}": (width, width) if part in PARTS[:4] else (width,) for part in PARTS}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"{path.name}: '{name}' is {tuple(tensors[name].shape)} of {tensors[name].dtype}, expected {shape} of "
                "floating point: it is not an adapter, or a damaged one."
            )
