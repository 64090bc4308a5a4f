"""LoRA (Hu et al. 2021, arXiv 2106.09685), eq. 3: h = W x + (alpha / r) B A x, added to the layer's output rather than
merged into its weight.

This way the two factors train without a gradient or a copy of W, which needs the least memory and works for weights in
any storage format.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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

    @property
    def weight(self) -> Tensor:
        full: Tensor = self.layer.weight  # ty: ignore[invalid-assignment]
        return full[self.start : self.start + self.count]


Layer = nn.Module | Rows


class LowRank(nn.Module):
    """The factors A [r, in, ...] and B [out, r] for one linear or convolution layer; B starts at zero, so the output is
    unchanged at first.
    """

    def __init__(
        self,
        layer: Layer,
        rank: int,
        generator: torch.Generator,
        alpha: float | None = None,
        deviation: float | None = None,
    ) -> None:
        """deviation: draw A from a normal distribution with this standard deviation, instead of uniformly as torch
        initialises a linear layer.
        """
        super().__init__()
        weight: Tensor = layer.weight  # ty: ignore[invalid-assignment]
        if weight.ndim not in (2, 4):
            raise ValueError(
                f"LoRA needs a linear or 2-D convolution layer, this one has a weight of shape {tuple(weight.shape)}."
            )
        shape, bound = (rank, *weight.shape[1:]), float(weight[0].numel()) ** -0.5
        if deviation is None:
            down = torch.rand(shape, generator=generator) * 2 * bound - bound
        else:
            down = torch.randn(shape, generator=generator) * deviation
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.scale = (rank if alpha is None else alpha) / rank
        self.stride, self.padding = getattr(layer, "stride", 1), getattr(layer, "padding", 0)

    def forward(self, x: Tensor) -> Tensor:
        """(alpha / r) B A x in the dtype of x: the float32 factors are cast, not the much larger activations."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if self.down.ndim == 2:
            return self.scale * F.linear(F.linear(x, down), up)
        hidden = F.conv2d(x, down, stride=self.stride, padding=self.padding)
        return self.scale * F.conv2d(hidden, up[:, :, None, None])

    def tensors(self, path: str, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The factors under ComfyUI's LoRA names; path is the layer's path in the model. values: "up" and "down" to use
        instead of the current ones."""
        up, down = (self.up, self.down) if values is None else (values["up"], values["down"])
        up = up if down.ndim == 2 else up[:, :, None, None]
        alpha = torch.tensor(self.scale * down.shape[0])
        named = {f"{path}.lora_up.weight": up, f"{path}.lora_down.weight": down, f"{path}.alpha": alpha}
        return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}

    def peft_tensors(self, path: str, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As tensors(), under PEFT's names, which have no alpha: the scale is folded into B."""
        up, down = (self.up, self.down) if values is None else (values["up"], values["down"])
        named = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": self.scale * up}
        return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}


@contextlib.contextmanager
def attached_lora(layers: Mapping[str, Layer], adapters: Mapping[str, LowRank]) -> Iterator[None]:
    """While active, each adapter's output is added to the output of the layer with the same name."""

    def hook(adapter: LowRank, start: int | None, count: int):
        def add(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            delta = adapter(inputs[0]).to(output.dtype)
            if start is None:
                return output + delta
            return torch.cat(
                [output[..., :start], output[..., start : start + count] + delta, output[..., start + count :]], -1
            )

        return add

    handles = []
    for name, adapter in adapters.items():
        layer = layers[name]
        if isinstance(layer, Rows):
            handles.append(layer.layer.register_forward_hook(hook(adapter, layer.start, layer.count)))
        else:
            handles.append(layer.register_forward_hook(hook(adapter, None, 0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# The usual default targets in the UNet and in CLIP; at rank 16 that is 3.2 M and 1.2 M parameters for SD1.x.
UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTION = re.compile(r"(.*\.)?(to_(q|k|v|out)(_\w+)?|add_[qkv]_proj|to_add_out)(\.0)?")  # also of a second stream
TEXT_PREFIX = "text_encoders."  # name prefix of a text encoder's parameters
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def attention_layers(module: nn.Module, prefix: str, ends: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """The query, key, value and output projections in a module, by path: those of all streams, or with these ends."""
    layers = {name: part for name, part in module.named_modules() if getattr(part, "weight", None) is not None}
    chosen = (name for name in layers if (name.endswith(ends) if ends else ATTENTION.fullmatch(name)))
    return {f"{prefix}.{name}": layers[name] for name in chosen}


def new_adapters(
    layers: Mapping[str, Layer], rank: int, seed: int, deviation: float | None = None
) -> dict[str, LowRank]:
    """One adapter per layer, initialised from the seed and the layer's name only."""
    return {
        name: LowRank(layer, rank, step_generator(seed, 0, f"lora {name}"), None, deviation).requires_grad_(True)
        for name, layer in layers.items()
    }


def factors(adapters: Mapping[str, LowRank]) -> dict[str, nn.Parameter]:
    """All trainable parameters of the adapters, by name."""
    return {f"{name}.{part}": value for name, adapter in adapters.items() for part, value in adapter.named_parameters()}
