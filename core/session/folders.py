"""The pack's model folders, and the conversion of widget names to paths that cannot leave them.

A name is what a combo shows: the path below the model folder, with "/" on every system. Names come from graphs that
anyone may have written, so only plain relative names of an expected kind are accepted. Symbolic links in the model
folders are the owner's and are followed, as ComfyUI does. Image folders lie in ComfyUI's input folder, which others may
write to, so links must not lead out of it.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath, PureWindowsPath

import folder_paths

from .inputs import Names


@dataclass(frozen=True)
class Kind:
    """A kind of model file. folder: its name below models/; markers: files whose presence makes a folder an entry."""

    folder: str
    extensions: tuple[str, ...]
    markers: tuple[str, ...] = ()
    hidden_prefixes: tuple[str, ...] = ()  # companions of an entry, not entries themselves
    source: str = ""  # where its files come from, and what else to do without one


EMBEDDINGS = Kind("likeness_embeddings", (".safetensors", ".pt"))
VISION = Kind("likeness_vision", (".safetensors",), ("config.json", "open_clip_config.json"))
LPIPS = Kind("likeness_lpips", (".safetensors", ".pth", ".pt"), hidden_prefixes=("alexnet", "vgg16"))
SAMS = Kind("sams", (".safetensors", ".pth"))  # other packs use this folder for segment-anything too
RETRIEVAL = Kind(
    "ir_features",
    (".safetensors", ".pth"),
    source="the weights of the instance-retrieval model are on Kaggle "
    "(https://www.kaggle.com/datasets/louieshao/guieweights0732, about 2.5 GB, with a Kaggle account): read their "
    "licence there, since some of the data that they were trained on is for research only, put the .pth file into "
    "models/ir_features and press R. Without them, disconnect this part: DINOv2 alone works nearly as well.",
)
ADAPTERS = Kind(
    "likeness_adapters",
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt"),
    ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
    source="download the zip that https://github.com/ZichengDuan/EZIGen links, unpack it there (the folder "
    "checkpoint-200000) and press R, or choose an adapter of your own; Train Subject Adapter makes one.",
)
LORAS = Kind("loras", (".safetensors", ".ckpt", ".pt"))  # ComfyUI's own; the last two only for a clear error message
DIFFUSERS = Kind("diffusers", (), ("model_index.json",))  # ComfyUI's own
HUB = "https://huggingface.co/"
SOURCES = {  # of what the shipped graphs name
    "dinov2-base": f"{HUB}facebook/dinov2-base (config.json, preprocessor_config.json, model.safetensors)",
    "dinov2-large": f"{HUB}facebook/dinov2-large (config.json, preprocessor_config.json, model.safetensors)",
    "dino-vits16": f"{HUB}facebook/dino-vits16 (config.json, preprocessor_config.json, model.safetensors)",
    "clip-vit-large-patch14": f"{HUB}openai/clip-vit-large-patch14 (all .json and .txt files, model.safetensors)",
    "grounding-dino-tiny": f"{HUB}IDEA-Research/grounding-dino-tiny (all .json and .txt files, model.safetensors)",
    "blip-image-captioning-base": f"{HUB}Salesforce/blip-image-captioning-base (all .json and .txt files, weights)",
    "sam_vit_b_01ec64.pth": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
}
KINDS = (EMBEDDINGS, VISION, LPIPS, SAMS, RETRIEVAL, ADAPTERS)


def register_folders() -> None:
    """Register the folders with ComfyUI, so that extra_model_paths.yaml can extend them. May be called repeatedly."""
    for kind in KINDS:
        folder_paths.add_model_folder_path(kind.folder, os.path.join(folder_paths.models_dir, kind.folder))


def roots(kind: Kind) -> list[str]:
    """The folders searched for this kind, in ComfyUI's order; new files are written to the first, a folder from
    extra_model_paths.yaml or else models/<kind>.
    """
    register_folders()
    return folder_paths.get_folder_paths(kind.folder)


def names(kind: Kind) -> Names:
    """All entries, sorted: files with the kind's extensions, and folders that contain a marker (not searched further).

    Only names that resolve() accepts: the lists are built while ComfyUI starts, which odd file names must not prevent.
    """
    entries: set[str] = set()
    for root in roots(kind):
        paths = [name.replace(os.sep, "/") for name in folder_paths.recursive_search(root, [".git"])[0]]
        files = [name for name in paths if not f"/{name}".count("/.")]
        marked = {folder for folder, _, file in (name.rpartition("/") for name in files) if file in kind.markers}
        for name in files:
            folders = accumulate(name.split("/")[:-1], "{}/{}".format) if marked else ()
            outermost = next((folder for folder in folders if folder in marked), None)
            hidden = name.rpartition("/")[2].lower().startswith(kind.hidden_prefixes or "\0")
            if outermost or _has_extension(kind, name) and not hidden:
                entries.add(outermost or name)
    return Names(sorted(name for name in entries if "\\" not in name and _plain_parts(name)))


def matching(kind: Kind, matches: Callable[[Path], bool]) -> Names:
    """Those names() whose paths match; what cannot be used, such as a link that leads nowhere, does not."""
    found = Names()
    for name in names(kind):
        with contextlib.suppress(OSError, ValueError):
            if matches(resolve(kind, name)):
                found.append(name)
    return found


def listed_name(kind: Kind, path: str | os.PathLike[str]) -> str:
    """The name under which names() lists a path. ValueError when the path is in none of the kind's folders."""
    real = Path(os.path.realpath(path))
    for root in map(os.path.realpath, roots(kind)):
        if real.is_relative_to(root):
            return real.relative_to(root).as_posix()
    raise ValueError(f"{real.name} does not lie in models/{kind.folder}: move it there.")


def resolve(kind: Kind, name: str) -> Path:
    """The path of an entry, in the first folder that has a valid one, as in names().

    ValueError for a name that is not a plain relative path or is of another kind; FileNotFoundError when there is
    nothing with that name.
    """
    quoted, parts = _quoted(name), _plain_parts(name)
    if not parts:
        raise ValueError(
            f"The model name {quoted} is not a plain name below models/{kind.folder}: choose one from the list."
        )
    paths = [path for root in roots(kind) if os.path.exists(path := Path(root, *parts))]
    for path in paths:
        if any((path / marker).is_file() for marker in kind.markers):
            return path
        if path.is_file() and _has_extension(kind, path.name):
            return path
    if paths:
        forms = {"a {} file": kind.extensions, "a folder with {}": kind.markers}
        expected = ", or ".join(form.format(" or ".join(names)) for form, names in forms.items() if names)
        raise ValueError(
            f"{quoted} in models/{kind.folder} was given, but {expected} is expected: choose another entry."
        )
    remedy = kind.source or "put it there and press R to refresh the list."
    if source := SOURCES.get(parts[-1]):
        remedy = (
            f"download {'its files' if kind.markers else 'it'} from {source} into models/{kind.folder}/{quoted[1:-1]} "
            "and press R to refresh the list."
        )
    raise FileNotFoundError(f"There is no {quoted} in {' or '.join(roots(kind))}: {remedy}")


def state(kind: Kind | None, name: object) -> str:
    """A string that changes when the files of an entry change, or those in its sub-folders, for a node's fingerprint.

    kind: None for a folder of images. name: None where it comes from a link, whose value ComfyUI does not know yet; the
    node's schema refuses all else that is no text.
    """
    if not isinstance(name, str):
        return ""
    path = resolve_image_folder(name) if kind is None else resolve(kind, name)
    files = sorted(each for each in (path, *path.glob("*"), *path.glob("*/*")) if each.is_file())
    return " ".join(f"{file}-{file.stat().st_mtime_ns}-{file.stat().st_size}" for file in files)


def image_folders() -> Names:
    """Folders in ComfyUI's input folder that contain folders, sorted: the layout of image sets with one folder for each
    subject.
    """
    root = Path(folder_paths.get_input_directory())
    parents = [folder for first in _subfolders(root) for folder in (first, *_subfolders(first)) if _subfolders(folder)]
    return Names(sorted(folder.relative_to(root).as_posix() for folder in parents))


def resolve_image_folder(name: str) -> Path:
    """The path of a folder in ComfyUI's input folder. ValueError for anything else."""
    parts = _plain_parts(name)
    path = Path(folder_paths.get_input_directory(), *parts)
    if not parts or not _in_input(path):
        raise ValueError(f"{_quoted(name)} is not a plain name in ComfyUI's input folder: choose one from the list.")
    if not os.path.isdir(path):
        raise ValueError(
            f"There is no folder {_quoted(name)} in ComfyUI's input folder: put it there and press R to refresh the "
            "list."
        )
    return path


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.name[0] != "." and path.is_dir() and _in_input(path)]
    except OSError:
        return []


def _in_input(path: Path) -> bool:
    return path.resolve().is_relative_to(os.path.realpath(folder_paths.get_input_directory()))


def _plain_parts(name: str) -> tuple[str, ...]:
    """The parts of a plain relative path; empty for anything else."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hostile = "\0" in name or ".." in parts or name.startswith(("/", "\\", "~")) or PureWindowsPath(name).drive
    return () if hostile else parts


def _quoted(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")


def _has_extension(kind: Kind, file: str) -> bool:
    return os.path.splitext(file.lower())[1] in kind.extensions
