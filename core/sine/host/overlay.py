"""One loaded network, two sets of weights: a fine-tuned MODEL that shares its module with the running model.

Two MODELs from one loader share one set of weights, and the one loaded last wins. So the fine-tuned one is never
loaded: while it predicts, the difference between its patches and the running model's is applied on the fly. A plain
LoRA is added to its layer's output (out + up(down(x)), without a copy of any weight); every other kind of patch uses
ComfyUI's weight functions, one layer at a time. The order in which the models are loaded does not matter.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import comfy.lora
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

from ...session.weights import replaced

Patch = tuple[float, Any, float, Any, Any]  # ComfyUI's: strength, adapter or tensors, strength of the weight, ...
SAME = ("object_patches", "injections", "weight_wrapper_patches")
SHARED = "model_sampling"  # shared within a module; equality of the schedules is checked elsewhere


def check_separable(tuned: Any, base: Any) -> None:
    """ValueError when two MODELs of one module differ in more than weights and options.

    Patches that replace a part of the module cannot apply to one of the two only, and a network compiled as a whole
    ignores hooks on its layers.
    """
    for name in SAME:
        one, other = getattr(tuned, name, {}), getattr(base, name, {})
        keys = (one.keys() | other.keys()) - {SHARED}
        different = sorted(key for key in keys if not _equal(one.get(key), other.get(key)))
        if different:
            raise ValueError(
                f"The tuned model and the base model are one loaded model with different {name.replace('_', ' ')} "
                f"({', '.join(map(str, different))[:200]}), which cannot be separated: apply the node that makes the "
                "difference to both of them, load LoRAs without 'bypass', or load a copy of the checkpoint file (under "
                "another name) for the tuned model."
            )
    for key, target, current, shared in _differences(tuned, base):
        _module_of(base.model, key, _signed(target, current, shared))
        if any(hasattr(value, "_orig_mod") for value in base.object_patches.values()):
            raise ValueError(
                "The model is compiled, and the tuned model is the same loaded model with other weights: compile with "
                "ComfyUI's own TorchCompileModel node, or load a copy of the checkpoint file for the tuned model."
            )


def _differences(tuned: Any, running: Any) -> Iterator[tuple[str, list[Patch], list[Patch], int]]:
    """Key, both lists of patches and the length of their common prefix, for every weight where they differ."""
    for key in sorted(tuned.patches.keys() | running.patches.keys()):
        target, current = tuned.patches.get(key, []), running.patches.get(key, [])
        # A clone keeps the patches of its original MODEL, the same objects.
        pairs = itertools.takewhile(lambda pair: pair[0] is pair[1], zip(target, current, strict=False))
        shared = len(list(pairs))
        if not shared == len(target) == len(current):
            yield key, target, current, shared


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def _signed(target: list[Patch], current: list[Patch], shared: int, share: float = 1.0) -> list[tuple[float, Patch]]:
    """The patches to add to the running model's weight, and those to take from it, each with its factor."""
    return [(share, patch) for patch in target[shared:]] + [(-share, patch) for patch in current[shared:]]


def _module_of(model: nn.Module, key: str, signed: list[tuple[float, Patch]]) -> tuple[nn.Module, str, bool]:
    """The module and attribute of a weight, and whether its patches can be added to the module's output."""
    path, _, attribute = key.rpartition(".")
    module = comfy.utils.get_attr(model, path)
    takes_lora = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    hooked = attribute == "weight" and takes_lora and all(map(_is_plain_lora, signed))
    if not hooked and not hasattr(module, f"{attribute}_function"):
        raise ValueError(
            f"The tuned model's patch of '{key}' cannot be separated from the base model, because that layer is not "
            "one of ComfyUI's and the patch is no plain LoRA: load a copy of the checkpoint file (under another name) "
            "for the tuned model."
        )
    return module, attribute, hooked


class Overlay:
    """Turns the running model into the fine-tuned one while active(), or moves it a share of the way, in 0..1."""

    def __init__(self, tuned: Any, running: Any, share: float = 1.0) -> None:
        """Both are ModelPatchers; only `running` is loaded, and its module predicts."""
        self._hooks: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._functions: list[tuple[nn.Module, str, Callable[[Tensor], Tensor]]] = []
        model = running.model
        for key, target, current, shared in _differences(tuned, running):
            signed = _signed(target, current, shared, share)
            module, attribute, hooked = _module_of(model, key, signed)
            if hooked:
                self._hooks.append((module, _lora_hook(signed)))
            elif shared == len(current):
                self._functions.append((module, attribute, _weight_function(key, target[shared:], None, module, share)))
            else:
                backup = running.backup.get(key)
                start = functools.partial(getattr, module, attribute) if backup is None else lambda b=backup: b.weight
                self._functions.append((module, attribute, _weight_function(key, target, start, module, share)))
        self.empty = not self._hooks and not self._functions
        """Whether both models have the same weights."""
        self.patched_weights = len(self._functions)
        """The number of weights that are patched again in every prediction: all except plain LoRAs."""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, hook in self._hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            for module, attribute, function in self._functions:
                name = f"{attribute}_function"  # one that has none uses its class's empty list
                stack.enter_context(replaced(module, **{name: [*getattr(module, name), function]}))
            yield


def _is_plain_lora(signed: tuple[float, Patch]) -> bool:
    """Whether a patch is a LoRA that adds a product of two matrices to the whole weight."""
    _, (_, adapter, strength_weight, offset, function) = signed
    if not isinstance(adapter, LoRAAdapter) or strength_weight != 1.0 or offset is not None or function is not None:
        return False
    return all(value is None for value in adapter.weights[3:6])  # mid, dora_scale, reshape


def _lora_hook(signed: list[tuple[float, Patch]]) -> Callable[..., Tensor]:
    ups, downs = [], []
    for sign, (strength, adapter, *_) in signed:
        up, down, alpha = adapter.weights[:3]
        scale = sign * strength * (1.0 if alpha is None else float(alpha) / down.shape[0])
        ups.append(scale * up.detach().flatten(1).float())
        downs.append(down.detach().flatten(1).float())
    up, down = torch.cat(ups, 1), torch.cat(downs)
    factors: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.dtype not in factors:
            factors[x.dtype] = (up.to(x), down.to(x))
        b, a = factors[x.dtype]
        if isinstance(module, nn.Linear):
            return output + F.linear(F.linear(x, a), b)
        assert isinstance(module, nn.Conv2d)
        kernel = a.view(a.shape[0], x.shape[1], *module.kernel_size)
        hidden = F.conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
        return output + F.conv2d(hidden, b[:, :, None, None])

    return hook


def _weight_function(
    key: str, patches: list[Patch], start: Callable[[], Tensor] | None, module: nn.Module, share: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """A weight function that applies ComfyUI's patch arithmetic to its weight, or to start() instead, and moves a share
    of the way to the result.

    Weights of quantised layers are unpacked first; scaled fp8 is multiplied by its scale after the function.
    """
    unpack, scale = getattr(module, "convert_weight", None), getattr(module, "scale_weight", None)
    if not key.endswith(".weight"):
        unpack = scale = None

    def function(weight: Tensor) -> Tensor:
        source = weight if start is None else start()
        source = source if unpack is None else unpack(source.to(weight.device), inplace=False)
        copy = source.to(device=weight.device, dtype=torch.float32, copy=True)  # calculate_weight adds in place
        result = comfy.lora.calculate_weight(patches, copy, key)
        result = result if scale is None else result / scale.to(result)
        result = result if share == 1.0 else torch.lerp(weight.to(result), result, share)
        if weight.dtype.is_floating_point and weight.dtype.itemsize == 1:
            limit = torch.finfo(weight.dtype)  # fp8: not every torch version saturates out-of-range values
            result = result.clamp(limit.min, limit.max)
        return result.to(weight.dtype)

    return function
