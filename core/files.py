"""Read and write weight files, which may come from untrusted sources.

Files are written as safetensors under a temporary name and then renamed, so a file is either complete or absent.
Reading checks size, header, memory and finite values; pickles are read as plain tensors only, and no code in them runs.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

HEADER_KEY = "likeness"
CHECKSUMS = "crc32"  # the part of a header with the CRC-32 of each tensor
LEFTOVER = r"likeness-[0-9a-f]{12}\.tmp|.+\.safetensors\.[0-9a-f]{32}\.tmp"  # the second: up to 0.5.0
LEFTOVER_SECONDS = 86_400
MAX_TEXT = 100_000  # characters of a text of a node, and so of a header; the longest prompts have some thousands
FORMAT = 1  # version of the artifact header
MAX_WORD, MAX_LOSSES, MAX_NUMBER = 200, 10_000, 1e300  # characters of a displayed string, losses, magnitude of a number
TABLE = "state_dict"  # key under which some programs save the tensors, next to other data
MAX_HEADER = 4 << 20  # bytes of JSON before the tensors


def write_tensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, Any], *, replace: bool = True, checksums: bool = False
) -> None:
    """Write tensors and a JSON header to path; an existing file is replaced atomically or left unchanged.

    Tensors move to the CPU one at a time, so saving a model's whole training state needs no second copy in memory.
    replace=False never overwrites: FileExistsError when another process was faster. checksums: what read_tensors()
    compares, for files that nothing but this pack changes. Raises OSError, before anything is written, when the disk is
    too full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if size > free:
        text = f"{path.name} needs {shown_bytes(size)}, {shown_bytes(free)} are free: make room on that disk"
        raise OSError(errno.ENOSPC, text)
    temporary = path.with_name(f"likeness-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_safetensors(file, tensors, header, checksums)
            file.flush()
            os.fsync(file.fileno())  # the contents must be on disk before the name becomes visible
        _remove_leftovers(path.parent, temporary.stat().st_mtime)
        if not replace:
            path.open("xb").close()  # FileExistsError for a name that something has
        try:
            os.replace(temporary, path)
        except BaseException:
            if not replace:
                path.unlink(missing_ok=True)  # the empty file that held the name
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def shown_bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} KB"


def _remove_leftovers(folder: Path, now: float) -> None:
    """Remove temporary files of processes that were killed while writing. now: by the clock of the file system."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if re.fullmatch(LEFTOVER, path.name) and now - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


def _write_safetensors(file: BinaryIO, tensors: dict[str, Tensor], header: dict[str, Any], checksums: bool) -> None:
    """The format is an eight-byte length, a JSON table of contents, and the tensor data in order."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sums = dict.fromkeys(names, "0" * 8) if checksums else {}
    file.write(_contents(names, tensors, header, sums))
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        if checksums:
            sums[name] = f"{zlib.crc32(data):08x}"
    if checksums:
        file.seek(0)
        file.write(_contents(names, tensors, header, sums))


@functools.cache
def _type_name(dtype: torch.dtype) -> str:
    """The name of a type in the format, as its library writes it behind the length."""
    return json.loads(save({"": torch.empty(0, dtype=dtype, device="cpu")})[8:])[""]["dtype"]


def _contents(names: list[str], tensors: dict[str, Tensor], header: dict[str, Any], sums: dict[str, str]) -> bytes:
    header = {**header, CHECKSUMS: sums} if sums else header
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except ValueError as error:  # what the loaders would refuse
        raise ValueError("The header holds a loss or setting that is no finite number: train it again.") from error
    contents: dict[str, Any] = {"__metadata__": {HEADER_KEY: text}}
    end = 0
    for name in names:
        value, start = tensors[name], end
        end += value.nbytes
        contents[name] = {"dtype": _type_name(value.dtype), "shape": list(value.shape), "data_offsets": [start, end]}
    table = json.dumps(contents).encode()
    table += b" " * (-len(table) % 8)
    return len(table).to_bytes(8, "little") + table


def read_tensors(
    path: Path, max_bytes: int, choose: Callable[[list[str]], list[str]] = list
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON header (empty when there is none) of a safetensors file.

    choose: selects the names to read; it may reject the file before anything else is read. Raises ValueError, with the
    remedy, for a file that is too large or malformed, or that contains non-finite numbers.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path.name} has {size} bytes, more than the {max_bytes} such a file can need: it is not one of ours."
        )
    with path.open("rb") as start:
        length = int.from_bytes(start.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise ValueError(f"{path.name} is cut off or not a safetensors file: copy or train it again.")
    with _open_safetensors(path) as file:
        names = list(file.keys())
    chosen = choose(names)
    with _open_safetensors(path) as file:  # all of one file: another process may replace it
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in chosen}
    for name, value in tensors.items():
        check_tensor(path, value, name)
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:  # not JSON, a number with thousands of digits, or nested too deeply
        raise ValueError(
            f"{path.name} has a damaged header ({type(error).__name__}): copy or train it again."
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a header that is not a table of settings: copy or train it again.")
    sums = header.pop(CHECKSUMS, None)
    for name, value in tensors.items() if isinstance(sums, dict) else ():
        if sums.get(name) != f"{zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data):08x}":
            raise ValueError(f"{path.name} is damaged: '{name[:80]}' is not what was written: copy or train it again.")
    return tensors, header


def read_weights(path: Path, max_bytes: int, choose: Callable[[list[str]], list[str]] = list) -> dict[str, Tensor]:
    """The tensors, by name, of another program's file: safetensors, or a pickled dict, optionally under "state_dict".

    choose: selects the names to read. The tensors may be views of the file. Raises ValueError, with the remedy, for a
    file that is not a dict of plain tensors, or whose tensors claim more memory than the file holds.
    """
    if path.suffix.lower() == ".safetensors":
        with torch.inference_mode(False):  # nodes run in inference mode, whose tensors cannot become parameters
            return read_tensors(path, max_bytes, choose)[0]
    table = read_plain(path, max_bytes)
    table = table.get(TABLE, table) if isinstance(table, dict) else None
    keyed = isinstance(table, dict) and all(isinstance(name, str) for name in table)
    if table is None or not keyed or not any(isinstance(value, Tensor) for value in table.values()):
        raise ValueError(f"{path.name} holds no table of weights: choose a state dict, or a .safetensors file.")
    tensors = {name: table[name] for name in choose([name for name in table if isinstance(table[name], Tensor)])}
    for name, value in tensors.items():
        check_tensor(path, value, name)
    return tensors


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file; none when it cannot be read."""
    with contextlib.suppress(OSError, ValueError), _open_safetensors(path) as file:
        return list(file.keys())
    return []


def read_table(path: Path) -> dict[str, Any]:
    """The settings in another program's JSON file. ValueError unless it is a table, of finite numbers only."""
    where = f"{path.name} of {path.parent.name}"
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"it has {shown_bytes(path.stat().st_size)}")
        whole, text = functools.partial(_checked, convert=int), path.read_text(encoding="utf-8")
        table = json.loads(text, parse_int=whole, parse_float=_checked, parse_constant=_checked)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read ({str(error)[:200]}): copy it again.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{where} is not a table of settings: copy it again.")
    return table


def _checked(text: str, convert: Callable[[str], float] = float) -> float:
    if not is_number(convert(text)):
        raise ValueError(f"it holds the number {text[:20]}")
    return convert(text)


def read_plain(path: Path, max_bytes: int) -> Any:
    """The content of a pickle of plain values and tensors; no code in it is run. ValueError for any other file."""
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path.name} has {size} bytes, more than the {max_bytes} such a file can need: choose another."
        )
    try:
        with torch.inference_mode(False):  # as above
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many types here; none of them should look like a crash of the node
        raise ValueError(
            f"{path.name} cannot be read as weights, it is not a plain tensor file ({type(error).__name__}): download "
            "it again, from its authors, or use a .safetensors file."
        ) from error


def check_tensor(path: Path, value: Tensor, name: str = "") -> None:
    """ValueError unless a tensor holds finite numbers and is backed by as much storage as its shape claims: a few bytes
    can be expanded to a view of billions of numbers.
    """
    where = f" in '{name[:80]}'" if name else ""
    plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_complex())
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path.name} holds something other than plain numbers{where}: save it again as safetensors.")
    numbers = value.float() if value.element_size() == 1 else value  # torch has no isfinite for 8-bit floats
    if value.is_floating_point() and not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{path.name} holds NaN or infinite numbers{where}: copy or train it again.")


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a readable safetensors file ({error}): copy or train it again."
        ) from error


def check_header(path: Path, header: dict[str, Any], kind: str, what: str) -> None:
    """ValueError unless this is the header of an artifact of this kind, with losses and strings safe to display.

    what: the artifact and the nodes that produce it, in words.
    """
    if header.get("kind") != kind:
        raise ValueError(f"{path.name} is not {what}.")
    if not isinstance(header.get("format"), int) or header["format"] > FORMAT:
        raise ValueError(
            f"{path.name} has format {header.get('format')}, this version reads up to {FORMAT}: update the pack."
        )
    losses, method = header.get("losses", []), header.get("method", "")
    checks = (
        isinstance(losses, list) and len(losses) <= MAX_LOSSES and all(map(is_number, losses)),
        isinstance(method, str) and len(method) <= MAX_WORD,
        all(isinstance(header.get(part, {}), dict) for part in ("base", "settings")),
    )
    if not all(checks):
        raise ValueError(f"{path.name} has a damaged header: copy or train it again.")


def is_number(value: Any) -> bool:
    """Whether this is a finite number within the range of a float."""
    return isinstance(value, Real) and -MAX_NUMBER <= value <= MAX_NUMBER
