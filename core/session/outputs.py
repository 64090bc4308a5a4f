"""Blocked outputs, loss maps for the stock loss graph, and paths of output files."""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_execution.graph_utils import ExecutionBlocker

MAX_NAME = 200  # bytes of a part of a name; file systems allow 255, of which a number and an ending take 19
MAX_PREFIX = 500  # characters; whole paths may have 1024 bytes on some systems
DEVICE = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # names that Windows keeps for itself
TRIES = 1000


def nothing() -> ExecutionBlocker:
    """The value of an unused output: nodes connected to it are silently skipped."""
    return ExecutionBlocker(None)


def loss_map(losses: Sequence[float]) -> dict[str, list[float]]:
    """A LOSS_MAP of at least one loss. The stock Plot Loss Graph divides by the range, so equal losses get one more."""
    values = [float(loss) for loss in losses]
    if max(values) == min(values):
        values.append(values[-1] + 1e-6 * max(1.0, abs(values[-1])))
    return {"loss": values}


def save_numbered(folder: str, prefix: str, save: Callable[[Path], None]) -> Path:
    """Save to a new file <prefix>_<number>_.safetensors in `folder`, and return its path.

    save(path) raises FileExistsError when another process was faster: the next number is taken then. ValueError for a
    prefix that check_prefix() refuses, or a folder that cannot be written.
    """
    for more in range(TRIES):  # some disks do not tell Subject from subject, which the number does
        path = numbered_path(folder, prefix, more)
        try:
            save(path)
        except FileExistsError:
            continue
        return path
    raise ValueError(f"No free number was found for {ascii(prefix[:80])}: choose another file name.")


def check_prefix(prefix: str) -> tuple[str, ...]:
    """The parts of a file name prefix, which may contain sub-folders and ComfyUI's %date:...% tokens.

    ValueError unless it is a plain relative name that the loaders list and this system can write.
    """
    shown = ascii(prefix[:80])
    plain = re.sub(r"%date:[^%:/\\]*%", "", prefix)
    parts = PurePosixPath(prefix.replace("\\", "/")).parts
    odd = [part for part in parts if part.startswith((".", "~")) or part != part.strip() or part.endswith(".")]
    odd += [part for part in parts if os.name == "nt" and re.fullmatch(DEVICE, part, re.IGNORECASE)]
    forbidden = any(c in plain for c in ":\0") or (os.name == "nt" and any(c in plain for c in '<>"|?*'))
    control = any(unicodedata.category(character) in ("Cc", "Cs") for character in prefix)  # Cs: lone surrogates
    if odd or forbidden or not parts or prefix.startswith(("/", "\\")) or control:
        raise ValueError(
            f"The file name {shown} is not a plain name below the pack's folder: use letters, digits, '-', '_' and '/'."
        )
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in parts)
    if longest > MAX_NAME or len(prefix) > MAX_PREFIX:
        raise ValueError(
            f"The file name {shown} is not a plain name that a disk can hold: it has {len(prefix)} characters, a part "
            f"{longest} bytes: shorten it to {MAX_PREFIX}, each part to {MAX_NAME}."
        )
    return parts


def prefix_answer(prefix: str | None) -> bool | str:
    """What a node's validate_inputs() says of a prefix, before any work; None: it comes by a link and is not known."""
    try:
        return prefix is None or bool(check_prefix(prefix))
    except ValueError as error:
        return str(error)


def numbered_path(folder: str, prefix: str, more: int = 0) -> Path:
    """The next free path of a prefix, or so many numbers later. ValueError as save_numbered(), and for what would leave
    the folder by a link.
    """
    name = "/".join(check_prefix(prefix))
    try:
        os.makedirs(folder, exist_ok=True)
        root = os.path.realpath(folder)
        _refuse_outside(root, os.path.join(root, os.path.dirname(name)), prefix)
        directory, stem, counter, _, _ = folder_paths.get_save_image_path(name, root)
    except OSError as error:
        raise ValueError(
            f"The folder {ascii(folder)} cannot be written ({error.strerror or type(error).__name__}): allow it, or "
            "name another one in extra_model_paths.yaml."
        ) from error
    path = os.path.join(directory, f"{stem}_{counter + more:05}_.safetensors")
    _refuse_outside(root, path, prefix)
    return Path(path)


def _refuse_outside(root: str, path: str, prefix: str) -> None:
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise ValueError(f"The file name {ascii(prefix[:80])} leads outside of the pack's folder: choose a plain name.")
