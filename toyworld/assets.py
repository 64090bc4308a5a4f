"""The committed narrow weights: reading, writing, and their list of hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent / "assets"
HASHES = "SHA256SUMS"
ROWS = ".row_factors"  # ending of the factors of a matrix that is stored in bytes
BYTES_FROM = 8192  # numbers in a matrix


def exists(name: str, folder: Path = ASSETS) -> bool:
    """Whether an asset is committed."""
    return (folder / f"{name}.safetensors").exists()


def read(name: str, folder: Path = ASSETS) -> dict[str, torch.Tensor]:
    """The tensors of one asset, in fp16."""
    from safetensors.torch import load_file

    path = folder / f"{name}.safetensors"
    if not path.exists():
        raise RuntimeError(f"The asset {path.name} is missing in {folder}: check the clone out again or train it.")
    stored = load_file(path)
    sizes = {key: stored.pop(key + ROWS) for key in list(stored) if key + ROWS in stored}
    return {key: value.half() * sizes[key] if key in sizes else value for key, value in stored.items()}


def read_turbo(folder: Path = ASSETS) -> dict[str, torch.Tensor]:
    """The generator with the network of its student of few steps."""
    student = {key.replace("network.", "unet.", 1): value for key, value in read("turbo", folder).items()}
    return read("generator", folder) | student


def in_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Large matrices as whole numbers from -127 to 127 with a factor per row: half of fp16, and off by about 1 %."""
    packed = dict(tensors)
    for key, value in tensors.items():
        if value.ndim < 2 or value.numel() < BYTES_FROM:
            continue
        rows = (value.float().abs().flatten(1).amax(1) / 127).clamp(min=1e-6).half()
        rows = rows.view(-1, *[1] * (value.ndim - 1))
        packed[key], packed[key + ROWS] = (value.float() / rows.float()).round().clamp(-127, 127).char(), rows
    return packed


def write(name: str, tensors: dict[str, torch.Tensor], folder: Path = ASSETS) -> Path:
    """Store tensors (floating point ones of more than one element as fp16) and renew the list of hashes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    small = {
        key: value.half() if value.is_floating_point() and value.numel() > 1 else value
        for key, value in tensors.items()
    }
    path = folder / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in small.items()}, str(path) + ".part")
    os.replace(str(path) + ".part", path)
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    (folder / HASHES).write_text("".join(lines))
    return path


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(folder: Path = ASSETS) -> None:
    """Raise RuntimeError where an asset differs from the list of hashes."""
    for line in (folder / HASHES).read_text().splitlines():
        expected, name = line.split("  ")
        if not (folder / name).exists() or sha256(folder / name) != expected:
            raise RuntimeError(f"The asset {name} is not the one listed in {HASHES}: check the clone out again.")
