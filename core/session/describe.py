"""Turning whatever hangs on a MODEL or in a CONDITIONING into plain values and tensors, for the key of a run.

LoRAs, patches of other packs, ControlNets and hooks all change what a training learns. They are told apart by their
numbers: weights, hint images, and the values that a patch's function has closed over. What cannot be told apart with
certainty must come out different, never equal: then a run is trained again, which costs time but is right.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
import types
import uuid
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLED_TENSORS = 16
SAMPLED_ELEMENTS = 1 << 16
DEPTH = 24
PATCHER = ("patches", "injections", "weight_wrapper_patches")
PASSING = ("original_forward",)  # a bypass LoRA's note while it is injected: says nothing of what it does
LOADED = ("model_loaded_weight_memory", "comfy_cast_weights")  # marks of ComfyUI's networks and of their layers
OWN_ROOM = re.compile(rf"^({re.escape(__name__.removesuffix('.core.session.describe'))})\.core\.\w+\.(host\b|\w+$)")
PLAIN = (str, int, float, bool, bytes, type(None))


def sampled(tensors: dict[str, Tensor]) -> dict[str, Tensor | str]:
    """The beginnings of 16 of these tensors, as float32 whatever they are stored in, and of 16 packed weights as bytes.

    Empty tensors say nothing: they are equal to none.
    """
    names = sorted(name for name, value in tensors.items() if not value.is_meta)
    numbers = [name for name in names if tensors[name].is_floating_point()]
    packed = [name for name in names if name.endswith("weight") and not tensors[name].is_floating_point()]
    found: dict[str, Tensor | str] = {name: unlike_any() for name, value in tensors.items() if value.is_meta}
    for kind in (numbers, packed):
        for name in kind[:: max(1, len(kind) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]:
            start = tensors[name].detach().flatten()[:SAMPLED_ELEMENTS].cpu()
            found[name] = start.float() if start.is_floating_point() else start
    return found


def contents(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, with the weights themselves where it shows empty tensors, as other packs' GGUF layers do.

    What such layers make up beside them belongs to no layer, and is left out.
    """
    layers, held = dict(module.named_modules()), dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name, value in module.state_dict().items():
        if not value.is_meta:
            found[name] = value
        elif name in held:
            found[name] = held[name].data.as_subclass(Tensor)
        elif name.rpartition(".")[0] in layers:
            found[name] = value
    return found


def contents_of_file(patcher: Any) -> dict[str, Tensor]:
    """The contents of a ModelPatcher's model as they are in its file: without what a LoRA has written into them."""
    found, backups = contents(patcher.model), getattr(patcher, "backup", {})
    for name in found.keys() & backups.keys():
        before = backups[name].weight
        packed = getattr(before, "state_dict", None)  # ComfyUI's quantised tensors; a state shows their bytes
        found[name] = before if packed is None else packed(name).get(name, before)
    return found


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Plain values, tensors and nests of them that are equal when `value` is; no memory addresses."""
    if isinstance(value, PLAIN):
        return value.hex() if isinstance(value, bytes) else value
    if isinstance(value, Tensor):
        return value
    if id(value) in above:
        return "..."
    if len(above) > DEPTH:
        return unlike_any()
    inside = (*above, id(value))
    if isinstance(value, (torch.dtype, torch.device, enum.Enum, slice, range)):
        return str(value)
    if isinstance(value, np.generic):
        return describe(value.item(), above)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), value.tobytes().hex()]
    if isinstance(value, functools.partial):
        return ["partial", describe([value.func, value.args, value.keywords], inside)]
    if isinstance(value, nn.Module):
        return [_kind(value, inside), sampled(contents(value))]
    if isinstance(value, dict):
        return {str(key): describe(item, inside) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [describe(item, inside) for item in value]
        return sorted(map(str, items)) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, type):
        return _name(value)
    if inspect.ismethod(value):
        return [_name(value.__func__), describe(value.__self__, inside)]
    if inspect.isfunction(value):
        closed = [_cell(cell) for cell in value.__closure__ or ()]
        parts = [value.__code__, closed, value.__defaults__, value.__kwdefaults__]
        return [_name(value), describe(parts, inside)]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), describe(value.co_consts, inside)]
    if inspect.isbuiltin(value) or inspect.ismodule(value):
        return [type(value).__name__, value.__name__]
    if isinstance(getattr(value, "model", None), nn.Module) and hasattr(value, "patches"):  # a ModelPatcher
        parts = {part: getattr(value, part, None) or {} for part in PATCHER}
        own = [_kind(value.model, inside), sampled(contents_of_file(value))]
        return ["model", own, describe(parts, inside)]
    if not hasattr(value, "__dict__"):
        return unlike_any()
    parts = {name: part for name, part in vars(value).items() if name not in PASSING}
    return [_name(type(value)), describe(parts, inside)]


def _kind(module: nn.Module, inside: tuple[int, ...]) -> Any:
    """The classes of a module and of those in it, with their settings; not those of what ComfyUI loads, which is known
    by its weights, and where it notes how it has loaded them.

    The bases are part of it: ComfyUI makes the classes of its samplings as it goes, all of one name, and the prediction
    type is nothing but a base of them.
    """
    bases = [_name(base) for base in type(module).__mro__]
    if any(hasattr(module, mark) for mark in LOADED):
        return [bases]
    settings = {name: value for name, value in vars(module).items() if name[0] != "_" and "comfy" not in name}
    settings.pop("training", None)
    return [bases, describe(settings, inside), [_kind(part, (*inside, id(part))) for part in module.children()]]


def unlike_any() -> str:
    """For what cannot be told apart: equal to nothing, so that the run is trained again."""
    return uuid.uuid4().hex


def _name(value: Any) -> str:
    """Module and name. The room of one of our own files is left out: a run is found again when a file has moved."""
    module = OWN_ROOM.sub(r"\1.core.\2", getattr(value, "__module__", None) or "")
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was never assigned
        return None
