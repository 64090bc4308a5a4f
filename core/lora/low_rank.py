"""LoRA (Hu et al. 2021, arXiv 2106.09685), eq. 3 with alpha = r: h = W x + B A x, added to the layer's output rather
than merged into its weight.

This way the two factors train without a gradient or a copy of W, which needs the least memory and works for weights in
any storage format.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fit.fit import step_generator


@dataclass(frozen=True)
class Rows:
    """A range of output rows of a fused linear layer, such as FLUX's combined query, key and value."""

    layer: nn.Module
    start: int
    count: int


Layer = nn.Module | Rows


def module_of(layer: Layer) -> nn.Module:
    """The layer itself, or the one that it is rows of."""
    return layer.layer if isinstance(layer, Rows) else layer


def sizes(layer: Layer) -> tuple[int, int]:
    """Output and input channels, also of a layer whose weight is stored in another shape. ValueError if not linear."""
    linear: Any = module_of(layer)
    if not _is_linear(linear):
        raise ValueError(f"LoRA needs a linear layer, this one is a {type(linear).__name__}.")
    return layer.count if isinstance(layer, Rows) else linear.out_features, linear.in_features


def low_rank_product(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """B A x in the dtype of x: the float32 factors are cast, not the much larger activations."""
    return F.linear(F.linear(x, down.to(x)), up.to(x))


class LowRank(nn.Module):
    """The factors A [r, in] and B [out, r] of one linear layer; B starts at zero: the output is unchanged at first."""

    def __init__(self, layer: Layer, rank: int, generator: torch.Generator, deviation: float | None = None) -> None:
        """deviation: draw A from a normal distribution with this standard deviation, instead of uniformly as torch
        initialises a linear layer.
        """
        super().__init__()
        rows, columns = sizes(layer)
        device = torch.as_tensor(module_of(layer).weight).device
        shape, bound = (rank, columns), float(columns) ** -0.5
        if deviation is None:
            down = torch.rand(shape, generator=generator) * 2 * bound - bound
        else:
            down = torch.randn(shape, generator=generator) * deviation
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=device))

    def product(self) -> tuple[Tensor, Tensor]:
        """B and A."""
        return self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_product(x, *self.product())

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The current factors as in file_tensors()."""
        return file_tensors(path, *self.product())


def file_tensors(path: str, up: Tensor, down: Tensor, peft: bool = False) -> dict[str, Tensor]:
    """B and A under ComfyUI's LoRA names, or PEFT's, which have no alpha; path is the layer's path in the model."""
    named = {f"{path}.lora_up.weight": up, f"{path}.lora_down.weight": down}
    named[f"{path}.alpha"] = torch.tensor(float(down.shape[0]))
    if peft:
        named = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}


@contextlib.contextmanager
def attached_lora(layers: Mapping[str, Layer], adapters: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While active, each adapter's output is added to the output of the layer with the same name."""

    def added(adapter: Callable[[Tensor], Tensor], layer: Layer, _module: Any, inputs: Any, output: Tensor) -> Tensor:
        delta = adapter(inputs[0]).to(output.dtype)
        if not isinstance(layer, Rows):
            return output + delta
        before, rows, behind = output.tensor_split((layer.start, layer.start + layer.count), -1)
        return torch.cat([before, rows + delta, behind], -1)

    with contextlib.ExitStack() as stack:
        for name, adapter in adapters.items():
            hook = functools.partial(added, adapter, layers[name])
            stack.callback(module_of(layers[name]).register_forward_hook(hook).remove)
        yield


TEXT_PREFIX = "text_encoders."  # name prefix of a text encoder's parameters
ATTENTION, ALL = "attention", "all"  # which layers of a network get a LoRA
LAYERS = (ATTENTION, ALL)
LISTS = (nn.Sequential, nn.ModuleList)


def _counts_heads(part: nn.Module) -> bool:
    """Whether a module divides its channels among attention heads."""
    return any("head" in name and type(value) is int for name, value in vars(part).items())


def is_attention(part: nn.Module) -> bool:
    """Whether it is an innermost module that counts heads."""
    _self, *below = part.modules()
    return _counts_heads(part) and not any(map(_counts_heads, below))


def _is_linear(part: nn.Module) -> bool:
    """Also of a quantised layer, which need not be torch's."""
    return all(type(getattr(part, name, None)) is int for name in ("in_features", "out_features"))


def attention_layers(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The projections of every attention in a module, whatever their names, by path: the linear layers directly in the
    innermost modules that count heads. In SD1.x at rank 16 that is 3.2 M parameters, in its text encoder 1.2 M.
    """
    layers: dict[str, nn.Module] = {}

    def add(owner: nn.Module, path: str) -> None:
        for name, part in owner.named_children():
            if _is_linear(part):
                layers[f"{path}.{name}"] = part
            elif isinstance(part, LISTS):
                add(part, f"{path}.{name}")

    for path, part in module.named_modules():
        if path and is_attention(part):
            add(part, f"{prefix}.{path}")
    return layers


def block_lists(network: nn.Module) -> dict[str, nn.Module]:
    """The lists of blocks at the top level of a network, by name: those with attention in them. Embedders, and refiners
    of the prompt, are none.
    """
    lists = ((name, part) for name, part in network.named_children() if isinstance(part, LISTS))
    return {name: part for name, part in lists if any(map(_counts_heads, part.modules()))}


def block_layers(network: nn.Module, prefix: str, kind: str = ATTENTION) -> dict[str, nn.Module]:
    """The linear layers of the blocks of a network, by path: those of its attention, or all of them."""
    layers: dict[str, nn.Module] = {}
    for name, blocks in block_lists(network).items():
        path = f"{prefix}.{name}"
        linear = {f"{path}.{below}": part for below, part in blocks.named_modules() if _is_linear(part)}
        layers |= linear if kind == ALL else attention_layers(blocks, path)
    return layers


def hidden_layers(network: nn.Module) -> dict[str, str]:
    """Parts of the blocks with packed weights that do not tell their size, by path, and what they are."""
    hidden: dict[str, str] = {}
    for name, blocks in block_lists(network).items():
        for path, part in blocks.named_modules():
            weights = [value for key, value in {**part._parameters, **part._buffers}.items() if "weight" in key]
            if not _is_linear(part) and any(each is not None and not each.is_floating_point() for each in weights):
                hidden[f"{name}.{path}"] = type(part).__name__
    return hidden


def new_adapters(
    layers: Mapping[str, Layer], rank: int, seed: int, kind: type[Any] = LowRank, **more: float
) -> dict[str, Any]:
    """One adapter per layer, initialised from the seed and the layer's name only. more: further arguments of `kind`."""
    return {name: kind(layer, rank, step_generator(seed, 0, f"lora {name}"), **more) for name, layer in layers.items()}


def factors(adapters: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{name}.{part}": value for name, adapter in adapters.items() for part, value in adapter.named_parameters()}
