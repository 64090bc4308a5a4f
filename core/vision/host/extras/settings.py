"""What a model's folder says of itself, checked before anything is built from it: any program may have written it."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....files import is_number, read_table, tensor_names
from ...preprocess import MAX_SIDE

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SIDES = ("size", "crop_size", "pad_size")
CHANNELS = ("image_mean", "image_std")
FILTERS = range(6)  # PIL's codes
PIXELS = "merge_size"  # of processors whose size is a number of pixels, not a side
MORE_LAYERS = 16  # times the layers in a model's files; some share one among several
SMALL = 1 << 20  # weights that need not be counted


def read_preprocessing(folder: Path) -> dict[str, Any] | None:
    """preprocessor_config.json of a folder, None without one. ValueError for values that no image processor can have,
    there or in processor_config.json, where newer libraries write them.
    """
    tables = {name: read_table(folder / name) for name in PROCESSORS if (folder / name).is_file()}
    for file, table in tables.items():
        part = table.get("image_processor")
        settings = {**table, **(part if isinstance(part, dict) else {})}
        most = MAX_SIDE**2 if PIXELS in settings else MAX_SIDE
        for name, value in settings.items():
            fits, expected = True, ""
            if name in SIDES:
                fits, expected = all(is_side(side, most) for side in _sides(value)), f"sides of 1 to {most} pixels"
            elif name in CHANNELS:
                fits, expected = is_color(value, positive=name == "image_std"), "three numbers, of image_std above 0"
            elif name.startswith("do_"):
                fits, expected = value in (True, False), "true or false"
            elif name == "resample":
                fits, expected = value in FILTERS, "a number from 0 to 5"
            elif name == "rescale_factor":
                fits, expected = is_number(value) and value > 0, "a number above 0"
            if not fits and value is not None:
                given = f"{file} of {folder.name} has {ascii(value)[:60]} as {name}"
                raise ValueError(f"{given}, expected {expected}: copy it again.")
    return tables.get(PROCESSORS[0])


def is_side(value: Any, most: int = MAX_SIDE) -> bool:
    """Whether this is a number of pixels."""
    return is_number(value) and not isinstance(value, bool) and 1 <= value <= most and value == int(value)


def is_color(value: Any, positive: bool = False) -> bool:
    """Whether these are three numbers, one for each channel."""
    listed = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_number, value))
    return listed and (not positive or min(value) > 0)


def _sides(value: Any) -> list[Any]:
    """The numbers of 224, [224, 224] or {"height": 224, "width": 224}; a table may name some without a number."""
    if isinstance(value, dict):
        value = [side for side in value.values() if side is not None]
    return (list(value) or [value]) if isinstance(value, (list, tuple)) else [value]


def check_size(
    where: str, config: dict[str, Any], files: Sequence[Path], build: Callable[[], nn.Module] | None
) -> None:
    """ValueError when settings ask for a network much larger than its files, before it is built: far more layers, by
    the names in the files, take time; more weights than the files have bytes take memory.

    build() makes the network, None where the files have fewer bytes than weights. One that cannot be built without
    memory is left to its library.
    """
    names = [name for file in files for name in tensor_names(file)]
    layers = max((int(part) for name in names for part in name.split(".") if part.isdecimal()), default=0) + 1
    todo: list[tuple[str, Any]] = [*config.items()]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += value.items()
        elif isinstance(value, list):
            todo += [(name, each) for each in value]
        elif "layers" in name and isinstance(value, int) and value > MORE_LAYERS * layers:
            raise ValueError(
                f"{where} asks for {value} layers ({name}), its files have {layers}: copy the settings and the weights "
                "of the same model."
            )
    count, stored = 0, sum(file.stat().st_size for file in files)
    with contextlib.suppress(Exception), torch.device("meta"):
        network = build() if build else nn.Module()
        count = sum(math.prod(part.shape) for part in (*network.parameters(), *network.buffers()))
    if count > stored + SMALL:
        raise ValueError(
            f"{where} asks for a network of {count} weights, its files have {stored} bytes: copy the settings and the "
            "weights of the same model."
        )
