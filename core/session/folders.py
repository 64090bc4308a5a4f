"""The pack's model folders, and names from widgets turned into paths that cannot leave them.

A name is what a combo shows: the path below the model folder, with "/" on every system. Names come from graphs that
anyone may have written, so they are checked as hostile: resolved through links, inside the folder, of an expected kind.
Folders of pictures lie in ComfyUI's input folder, under the same rules.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths


@dataclass(frozen=True)
class Kind:
    """One sort of model files. folder: its name below models/; markers: files that make a folder one entry."""

    folder: str
    extensions: tuple[str, ...]
    markers: tuple[str, ...] = ()
    hidden_prefixes: tuple[str, ...] = ()  # companions of an entry, not entries themselves

    def expected(self) -> str:
        """What an entry looks like, for error messages."""
        files = ["a " + " or ".join(self.extensions) + " file"] if self.extensions else []
        return ", or ".join(files + ([f"a folder with {' or '.join(self.markers)}"] if self.markers else []))


EMBEDDINGS = Kind("likeness_embeddings", (".safetensors", ".pt"))
VISION = Kind("likeness_vision", (".safetensors",), ("config.json", "open_clip_config.json"))
LPIPS = Kind("likeness_lpips", (".safetensors", ".pth", ".pt"), hidden_prefixes=("alexnet", "vgg16"))
SAMS = Kind("sams", (".safetensors", ".pth"))  # the folder that other packs use for segment-anything too
RETRIEVAL = Kind("ir_features", (".safetensors", ".pth"))
ADAPTERS = Kind(
    "likeness_adapters",
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
)
LORAS = Kind("loras", (".safetensors", ".ckpt", ".pt"))  # ComfyUI's own; the last two only to say what they are
DIFFUSERS = Kind("diffusers", (), ("model_index.json",))  # ComfyUI's own
KINDS = (EMBEDDINGS, VISION, LPIPS, SAMS, RETRIEVAL, ADAPTERS)


def register_folders() -> None:
    """Make the folders known to ComfyUI, so that extra_model_paths.yaml can add to them. May be called repeatedly."""
    for kind in KINDS:
        folder_paths.add_model_folder_path(kind.folder, os.path.join(folder_paths.models_dir, kind.folder))


def roots(kind: Kind) -> list[str]:
    """The folders searched for this kind, in ComfyUI's order."""
    register_folders()
    return folder_paths.get_folder_paths(kind.folder)


def first_folder(kind: Kind) -> str:
    """Where new files of this kind are written: a folder that extra_model_paths.yaml names, else models/<kind>."""
    return roots(kind)[0]


def names(kind: Kind) -> list[str]:
    """All entries, sorted: files with the kind's extensions, and folders that hold a marker (not looked into).

    Only names that resolve() accepts: lists are made while ComfyUI starts, and nothing odd on a disk may stop that.
    """
    found: set[str] = set()
    for root in roots(kind):
        for directory, subfolders, files in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            below = Path(directory).relative_to(root)
            if not _inside(root, directory):
                subfolders.clear()
            elif directory != root and any(os.path.isfile(os.path.join(directory, marker)) for marker in kind.markers):
                found.add(below.as_posix())
                subfolders.clear()
            else:  # nothing but a link can lead out of a folder, and looking where a path leads takes long
                begin = "" if directory == root else f"{below.as_posix()}/"
                paths = {name: os.path.join(directory, name) for name in files if _is_listed(kind, name)}
                inside = (name for name, path in paths.items() if not os.path.islink(path) or _inside(root, path))
                found.update(begin + name for name in inside)
    return sorted(name for name in found if "\\" not in name and _plain_parts(name))


def listed_name(kind: Kind, path: str | os.PathLike[str]) -> str:
    """The name under which names() lists a path. ValueError when it lies in none of the kind's folders."""
    real = os.path.realpath(path)
    for root in roots(kind):
        if _inside(root, real):
            return Path(real).relative_to(os.path.realpath(root)).as_posix()
    raise ValueError(f"{os.path.basename(real)} does not lie in models/{kind.folder}: move it there.")


def resolve(kind: Kind, name: str) -> Path:
    """The path of an entry, links resolved.

    The first folder that has such an entry counts, as in names(). Raises ValueError for a name that is not a plain
    relative path, leaves the kind's folders (through a link too), or is of another kind; FileNotFoundError when nothing
    of that name is there.
    """
    shown, parts = _shown(name), _plain_parts(name)
    if not parts:
        raise ValueError(
            f"The model name {shown} is not a plain name below models/{kind.folder}: choose one from the list."
        )
    refused: ValueError | None = None
    for root in roots(kind):
        path = os.path.join(root, *parts)
        if not os.path.lexists(path):
            continue
        try:
            _check_entry(kind, root, path, shown)
        except ValueError as error:
            refused = refused or error
            continue
        return Path(os.path.realpath(path))
    if refused is not None:
        raise refused
    raise FileNotFoundError(
        f"There is no {shown} in {' or '.join(roots(kind))}: put it there and press R to refresh the list."
    )


def state(kind: Kind, name: str | None) -> str:
    """Changes when the files of an entry do, for a node's fingerprint. None: the name comes by a link, and ComfyUI does
    not tell it yet.
    """
    if name is None:
        return ""
    path = resolve(kind, name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return " ".join(f"{f.name}-{f.stat().st_mtime_ns}-{f.stat().st_size}" for f in files if f.is_file())


def picture_folders() -> list[str]:
    """Folders in ComfyUI's input folder that hold folders, sorted: sets of pictures by subject look so."""
    root, found = folder_paths.get_input_directory(), []
    for first in _subfolders(root, root):
        found += [first] if _subfolders(root, os.path.join(root, first)) else []
        for second in _subfolders(root, os.path.join(root, first)):
            name = f"{first}/{second}"
            found += [name] if _subfolders(root, os.path.join(root, first, second)) else []
    return sorted(found)


def resolve_picture_folder(name: str) -> Path:
    """The path of a folder in ComfyUI's input folder, links resolved. ValueError for anything else."""
    root, parts = folder_paths.get_input_directory(), _plain_parts(name)
    path = os.path.join(root, *parts)
    if not parts or not _inside(root, path):
        raise ValueError(f"{_shown(name)} is not a plain name in ComfyUI's input folder: choose one from the list.")
    if not os.path.isdir(path):
        raise ValueError(
            f"There is no folder {_shown(name)} in ComfyUI's input folder: put it there and press R to refresh the "
            "list."
        )
    return Path(os.path.realpath(path))


def picture_folder_state(name: str | None) -> str:
    """As state(), of such a folder."""
    if name is None:
        return ""
    path = resolve_picture_folder(name)
    files = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern) if file.is_file())
    return " ".join(f"{f.relative_to(path)}-{f.stat().st_mtime_ns}-{f.stat().st_size}" for f in files)


def _subfolders(root: str, folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    return [name for name in names if _inside(root, os.path.join(folder, name))]


def _plain_parts(name: str) -> tuple[str, ...]:
    """The parts of a relative path; none when it is anything else."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hostile = "\0" in name or ".." in parts or name.startswith(("/", "\\", "~")) or PureWindowsPath(name).drive
    return () if hostile else parts


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _check_entry(kind: Kind, root: str, path: str, shown: str) -> None:
    if not _inside(root, path):
        raise ValueError(
            f"The model name {shown} leads outside of models/{kind.folder}: put the file itself there, or name its "
            "folder in extra_model_paths.yaml."
        )
    if os.path.isdir(path):
        right = any(os.path.isfile(os.path.join(path, marker)) for marker in kind.markers)
    else:
        right = os.path.splitext(path)[1].lower() in kind.extensions
    if not right:
        raise ValueError(
            f"{shown} in models/{kind.folder} was given, but {kind.expected()} is expected: choose another entry."
        )


def _is_listed(kind: Kind, file: str) -> bool:
    lower = file.lower()
    return os.path.splitext(lower)[1] in kind.extensions and not lower.startswith(kind.hidden_prefixes or "\0")


def _inside(root: str, path: str) -> bool:
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    same_drive = os.path.splitdrive(real_root)[0] == os.path.splitdrive(real)[0]
    return same_drive and os.path.commonpath([real_root, real]) == real_root
