"""A diffusers UNet of SD2.1's kind as the Network that EZIGen's adapter is trained in (see core/ezigen_training.py).

The adapter takes the place that diffusers keeps in every transformer block for GLIGEN: behind the self-attention and
its residual, before the cross-attention. So the UNet runs diffusers' own code, and what the adapter reads travels as an
argument, which gradient checkpointing needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...core.ezigen.adapter import Adapter, Layer, SubjectTokens
from ...core.ezigen.artifact import sort_layers

BLOCK = ".transformer_blocks."


def blocks(unet: nn.Module) -> dict[str, Any]:
    """The transformer blocks of a UNet by name, in the order in which they run."""
    found = {name: part for name, part in unet.named_modules() if name.rpartition(".")[0].endswith(BLOCK[:-1])}
    return {name: found[name] for name in sort_layers(found)}


def layers(unet: nn.Module) -> list[Layer]:
    """Where the adapter stands. ValueError for a UNet that it cannot stand in."""
    found = blocks(unet)
    plain = all(
        getattr(part, "norm_type", None) == "layer_norm" and not part.only_cross_attention for part in found.values()
    )
    if not found or not plain:
        raise ValueError(
            f"The UNet ({type(unet).__name__}) has no transformer blocks with self-attention like those of SD1.x and "
            "SD2.x: choose a folder of SD2.1-base."
        )
    return [Layer(name, part.attn1.to_q.weight.shape[0], part.attn1.heads) for name, part in found.items()]


def new_adapter(unet: nn.Module) -> Adapter:
    """An adapter for a UNet, in float32, as the published training starts it."""
    adapter = Adapter(layers(unet))
    adapter.start_from({name: value.detach().float().cpu() for name, value in unet.state_dict().items()})
    return adapter


class DiffusersUNet:
    """A frozen UNet with the adapter in it."""

    def __init__(self, unet: Any, adapter: Adapter, alphas_cumprod: Tensor) -> None:
        """The UNet is the network's own from then on: its blocks are given the adapter's place."""
        self.unet, self.adapter = unet, adapter
        self.alphas_cumprod = alphas_cumprod.detach().float().cpu()
        self._kept: dict[int, Tensor] | None = None
        self._asked: set[int] = set()
        unet.position_net = _as_it_is
        self._count = 0
        for index, part in enumerate(blocks(unet).values()):
            part.fuser = self._place(index)
            part.attn1.register_forward_pre_hook(self._keeper(index))
            self._count += 1

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        self._kept = {}
        try:
            self.unet(z, timestep, context)
            return [self._kept[index] for index in range(self._count)]
        finally:
            self._kept = None

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens | None) -> Tensor:
        self._asked.clear()
        given = {"gligen": {"tokens": tokens}}
        noise = self.unet(z, timestep, context, cross_attention_kwargs=given).sample
        if len(self._asked) != self._count:
            raise RuntimeError(
                f"This version of diffusers asked the adapter in {len(self._asked)} of {self._count} blocks: install "
                "one that the docs name."
            )
        return noise

    def _place(self, index: int) -> Callable[[Tensor, SubjectTokens | None], Tensor]:
        def behind_self_attention(h: Tensor, tokens: SubjectTokens | None) -> Tensor:
            self._asked.add(index)
            return self.adapter(index, h, tokens)

        return behind_self_attention

    def _keeper(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_attention: nn.Module, given: tuple[Any, ...]) -> None:
            if self._kept is not None:
                self._kept[index] = given[0].detach()

        return keep


def _as_it_is(tokens: SubjectTokens | None) -> SubjectTokens | None:
    """In the place of GLIGEN's network for boxes."""
    return tokens
