"""A diffusers UNet like SD2.1's as the Network of EZIGen's adapter training (see core/ezigen/train.py).

The adapter uses diffusers' slot for GLIGEN in every transformer block: after the self-attention and its residual,
before the cross-attention. So the UNet runs diffusers' own code, and the adapter's input is passed as an argument, as
gradient checkpointing requires.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ...core.ezigen.adapter import Adapter, Layer, SubjectTokens
from ...core.ezigen.artifact import sort_layers


def blocks(unet: nn.Module) -> dict[str, Any]:
    """The transformer blocks of a UNet by name, in execution order."""
    parts = {
        name: part for name, part in unet.named_modules() if name.rpartition(".")[0].endswith(".transformer_blocks")
    }
    return {name: parts[name] for name in sort_layers(parts)}


def layers(unet: nn.Module) -> list[Layer]:
    """The layers that get the adapter. ValueError for an unsupported UNet."""
    parts = blocks(unet)
    kinds = {(getattr(part, "norm_type", ""), getattr(part, "only_cross_attention", True)) for part in parts.values()}
    if kinds != {("layer_norm", False)}:
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
        unet.position_net = nn.Identity()  # in the place of GLIGEN's network for boxes
        for index, part in enumerate(blocks(unet).values()):
            part.fuser = partial(self._add, index)
            part.attn1.register_forward_pre_hook(partial(self._record, index))

    def capture(self, z: Tensor, timestep: Tensor, context: Tensor) -> list[Tensor]:
        self._inputs = {}
        try:
            self._predicted(z, timestep, context)
            return [self._inputs[index] for index in range(len(self.adapter.described))]
        finally:
            self._inputs = None

    def predicted_noise(self, z: Tensor, timestep: Tensor, context: Tensor, tokens: SubjectTokens) -> Tensor:
        self._called.clear()
        noise = self._predicted(z, timestep, context, cross_attention_kwargs={"gligen": {"input": tokens}})
        if len(self._called) != len(self.adapter.described):
            raise RuntimeError(
                f"This version of diffusers asked the adapter in {len(self._called)} of {len(self.adapter.described)} "
                "blocks: install one that the docs name."
            )
        return noise

    def _predicted(self, z: Tensor, timestep: Tensor, context: Tensor, **options: Any) -> Tensor:
        """In the precision of the UNet."""
        return self.unet(z.to(self.unet.dtype), timestep, context.to(self.unet.dtype), **options).sample

    def _add(self, index: int, h: Tensor, tokens: SubjectTokens) -> Tensor:
        self._called.add(index)
        return self.adapter(index, h, tokens)

    def _record(self, index: int, _attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._inputs is not None:
            self._inputs[index] = inputs[0].detach()
