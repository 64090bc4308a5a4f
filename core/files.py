"""Reading and writing safetensors files that may come from anyone.

Written to a temporary name and renamed, so a file is whole or absent. Read with limits: size, header, shapes, finite
values.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HEADER_KEY = "likeness"
MAX_HEADER = 4 << 20  # bytes of JSON in front of the tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to path; an existing file is replaced in one step or left as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(ready, temporary, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the name must not become visible before the contents are on disk
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON header (empty when there is none) of a safetensors file.

    Raises ValueError, with the remedy, for a file that is too large, malformed, or holds numbers that are not finite.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path.name} has {size} bytes, more than the {max_bytes} such a file can need: it is not one of ours."
        )
    _check_header_length(path, size)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a readable safetensors file ({error}): copy or train it again."
        ) from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path.name} holds NaN or infinite numbers in '{name}': copy or train it again.")
    return tensors, _parse_header(path, metadata)


def _check_header_length(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"{path.name} is cut off or not a safetensors file: copy or train it again.")


def _parse_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path.name} has a damaged header ({type(error).__name__}): copy or train it again."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a header that is not a table of settings: copy or train it again.")
    return header
