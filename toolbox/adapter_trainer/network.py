"""A diffusers UNet like SD2.1's as the Network of EZIGen's adapter training (see core/ezigen/train.py).

The adapter uses diffusers' slot for GLIGEN in every transformer block: after the self-attention and its residual,
before the cross-attention. So the UNet runs diffusers' own code, and the adapter's input is passed as an argument, as
gradient checkpointing requires.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...core.ezigen.adapter import Adapter, Layer, SubjectTokens
from ...core.ezigen.artifact import sort_layers

BLOCK = ".transformer_blocks."


def blocks(unet: nn.Module) -> dict[str, Any]:
    """The transformer blocks of a UNet by name, in execution order."""
    parts = {name: part for name, part in unet.named_modules() if name.rpartition(".")[0].endswith(BLOCK[:-1])}
    return {name: parts[name] for name in sort_layers(parts)}


def layers(unet: nn.Module) -> list[Layer]:
    """The layers that get the adapter. ValueError for an unsupported UNet."""
    parts = blocks(unet)
    plain = all(
        getattr(part, "norm_type", None) == "layer_norm" and not part.only_cross_attention for part in parts.values()
    )
    if not parts or not plain:
        raise ValueError(
            f"The UNet ({type(unet).__name__}) has no transformer blocks with self-attention like those of SD1.x and "
            "SD2.x: choose a folder of SD2.1-base."
        )
    return [Layer(name, part.attn1.to_q.weight.shape[0], part.attn1.heads) for name, part in parts.items()]


def diffusers_adapter(unet: nn.Module) -> Adapter:
    """An adapter for a diffusers UNet, in float32, with the published initialisation."""
    adapter = Adapter(layers(unet))
    adapter.start_from({name: value.detach().float().cpu() for name, value in unet.state_dict().items()})
    return adapter


class DiffusersUNet:
    """A frozen UNet with the adapter in it."""

    def __init__(self, unet: Any, adapter: Adapter, alphas_cumprod: Tensor) -> None:
        """Takes over the UNet: installs the adapter and hooks in its blocks."""
        self.unet, self.adapter = unet, adapter
        self.alphas_cumprod = alphas_cumprod.detach().float().cpu()
        self._inputs: dict[int, Tensor] | None = None
        self._called: set[int] = set()
        unet.position_net = _identity
        self._count = 0
        for index, part in enumerate(blocks(unet).values()):
            part.fuser = self._fuser(index)
            part.attn1.register_forward_pre_hook(self._input_hook(index))
            self._count += 1

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        self._inputs = {}
        try:
            self.unet(z, timestep, context)
            return [self._inputs[index] for index in range(self._count)]
        finally:
            self._inputs = None

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens | None) -> Tensor:
        self._called.clear()
        attention_kwargs = {"gligen": {"tokens": tokens}}
        noise = self.unet(z, timestep, context, cross_attention_kwargs=attention_kwargs).sample
        if len(self._called) != self._count:
            raise RuntimeError(
                f"This version of diffusers asked the adapter in {len(self._called)} of {self._count} blocks: install "
                "one that the docs name."
            )
        return noise

    def _fuser(self, index: int) -> Callable[[Tensor, SubjectTokens | None], Tensor]:
        def behind_self_attention(h: Tensor, tokens: SubjectTokens | None) -> Tensor:
            self._called.add(index)
            return self.adapter(index, h, tokens)

        return behind_self_attention

    def _input_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_attention: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._inputs is not None:
                self._inputs[index] = inputs[0].detach()

        return record


def _identity(tokens: SubjectTokens | None) -> SubjectTokens | None:
    """Replaces GLIGEN's network for boxes."""
    return tokens
