"""Convert everything attached to a MODEL or CONDITIONING to plain values and tensors, for the key of a run.

LoRAs, other packs' patches, ControlNets and hooks all change what a training learns. They are distinguished by their
numbers: weights, hint images, and the values in the closures of patch functions. Anything that cannot be identified
with certainty must compare as different, never as equal: the run is then trained again, which takes time but is right.
"""

import contextvars
import dis
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
TRANSIENT = ("original_forward",)  # set by a bypass LoRA while it is injected; independent of what it does
COMFY_MARKS = ("model_loaded_weight_memory", "comfy_cast_weights")  # attributes of ComfyUI's networks and their layers
OWN_ROOM = rf"^({re.escape(__name__.removesuffix('.core.session.describe'))})\.core\.\w+\.(host\b|\w+$)"
_STATE: contextvars.ContextVar[set[int]] = contextvars.ContextVar("closure cells that functions assign, by id")
PLAIN = (str, int, float, bool, bytes, type(None))


def sampled(tensors: dict[str, Tensor]) -> dict[str, Tensor | str]:
    """The first elements of 16 of these tensors, as float32 whatever their dtype, and of 16 packed weights as bytes.

    Meta tensors carry no values, so they compare as unequal to everything.
    """
    names = sorted(name for name, value in tensors.items() if not value.is_meta)
    numbers = [name for name in names if tensors[name].is_floating_point()]
    packed = [name for name in names if name.endswith("weight") and not tensors[name].is_floating_point()]
    samples: dict[str, Tensor | str] = {name: unique_value() for name, value in tensors.items() if value.is_meta}
    for kind in (numbers, packed):
        for name in kind[:: max(1, len(kind) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]:
            start = tensors[name].detach().flatten()[:SAMPLED_ELEMENTS].cpu()
            samples[name] = start.float() if start.is_floating_point() else start
    return samples


def contents(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict, with the parameters themselves where it has meta tensors, as in other packs' GGUF layers.

    Further entries of such layers that belong to no layer are excluded.
    """
    layers, parameters = dict(module.named_modules()), dict(module.named_parameters(remove_duplicate=False))
    state = {}
    for name, value in module.state_dict().items():
        if not value.is_meta:
            state[name] = value
        elif name in parameters:
            state[name] = parameters[name].data.as_subclass(Tensor)
        elif name.rpartition(".")[0] in layers:
            state[name] = value
    return state


def contents_of_file(patcher: Any) -> dict[str, Tensor]:
    """The contents of a ModelPatcher's model as in its file, without any LoRA merged into them."""
    state, backups = contents(patcher.model), getattr(patcher, "backup", {})
    for name in state.keys() & backups.keys():
        original = backups[name].weight
        packed = getattr(original, "state_dict", None)  # ComfyUI's quantised tensors; a state dict has their bytes
        state[name] = original if packed is None else packed(name).get(name, original)
    return state


def describe(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Nested plain values and tensors that are equal when `value` is; without memory addresses.

    Variables that a function itself assigns while it runs (nonlocal, as in ComfyUI's ToMe and SAG) are its state, and
    do not tell one function from another: they are left out, in the functions that read them too. A first pass finds
    them.
    """
    if not above:
        token = _STATE.set(set())
        try:
            describe(value, (id(_STATE),))
            return describe(value, (id(_STATE),))
        finally:
            _STATE.reset(token)
    if isinstance(value, PLAIN):
        return value.hex() if isinstance(value, bytes) else value
    if isinstance(value, Tensor):
        return value
    if id(value) in above:
        return "..."
    if len(above) > DEPTH:
        return unique_value()
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
        parts = [value.__code__, _closure(value), value.__defaults__, value.__kwdefaults__]
        return [_name(value), describe(parts, inside)]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), describe(value.co_consts, inside)]
    if inspect.isbuiltin(value) or inspect.ismodule(value):
        return [type(value).__name__, value.__name__]
    if isinstance(getattr(value, "model", None), nn.Module) and hasattr(value, "patches"):  # a ModelPatcher
        parts = {part: getattr(value, part, None) or {} for part in PATCHER}
        model = [_kind(value.model, inside), sampled(contents_of_file(value))]
        return ["model", model, describe(parts, inside)]
    if not hasattr(value, "__dict__"):
        return unique_value()
    parts = {name: part for name, part in vars(value).items() if name not in TRANSIENT}
    return [_name(type(value)), describe(parts, inside)]


def _closure(function: Any) -> list[Any]:
    """The values of a function's outer variables, None for those that some function assigns while it runs."""
    assigned = {each.argval for each in dis.get_instructions(function.__code__) if each.opname == "STORE_DEREF"}
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    _STATE.get().update(id(cell) for name, cell in cells.items() if name in assigned)
    return [None if id(cell) in _STATE.get() else _cell(cell) for cell in cells.values()]


def _kind(module: nn.Module, inside: tuple[int, ...]) -> Any:
    """The classes of a module and its children, with their settings. Models loaded by ComfyUI give their classes only:
    their weights identify them, and their attributes record how they are loaded.

    The base classes are included: ComfyUI creates its sampling classes at run time, all with the same name, and the
    prediction type is only one of their bases.
    """
    bases = [_name(base) for base in type(module).__mro__]
    if any(hasattr(module, mark) for mark in COMFY_MARKS):
        return [bases]
    settings = {name: value for name, value in vars(module).items() if name[0] != "_" and "comfy" not in name}
    settings.pop("training", None)
    return [bases, describe(settings, inside), [_kind(part, (*inside, id(part))) for part in module.children()]]


def unique_value() -> str:
    """For anything that cannot be identified: a value equal to no other, so that the run is trained again."""
    return uuid.uuid4().hex


def _name(value: Any) -> str:
    """Module and name. For the pack's own modules the room is left out, so that moving a file does not change keys."""
    module = re.sub(OWN_ROOM, r"\1.core.\2", getattr(value, "__module__", None) or "")
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was never assigned
        return None
