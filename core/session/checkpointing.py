"""Gradient checkpointing: blocks are computed again in backward instead of storing their activations."""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..lora.low_rank import LISTS, block_lists
from .weights import replaced

DECODER = (
    *("ResnetBlock", "AttnBlock", "Upsample", "Block"),  # ComfyUI's KL autoencoders and TAESD
    *("ResBlock", "EfficientViTBlock", "DCUpBlock2d"),  # diffusers' deep compression autoencoder
)
log = logging.getLogger("likeness")


def checkpointed(module: nn.Module, names: Collection[str] = ()) -> contextlib.AbstractContextManager[None]:
    """Recompute a network's blocks, or the parts of these classes, in backward: less memory, more time."""
    blocks = [part for part in module.modules() if type(part).__name__ in names] if names else blocks_of(module)
    if not blocks:
        log.warning("Checkpointing saves nothing: it knows no blocks of this %s.", type(module).__name__)
    return _checkpointed(blocks)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network: what stands in its lists of blocks, and in lists within these."""

    def inside(part: nn.Module) -> list[nn.Module]:
        return [block for child in part.children() for block in inside(child)] if isinstance(part, LISTS) else [part]

    return [block for part in block_lists(network).values() for block in inside(part)]


def layers_checkpointed(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The same for every stack of equal layers in a vision model, whichever library it comes from."""
    outer: list[nn.Module] = []
    inner: set[int] = set()
    for part in module.modules():
        layers = list(part.children()) if isinstance(part, nn.ModuleList) and id(part) not in inner else []
        if len(layers) > 1 and len({type(layer) for layer in layers}) == 1:
            outer += layers
            inner |= {id(below) for layer in layers for below in layer.modules()}
    return _checkpointed(outer)


@contextlib.contextmanager
def _checkpointed(parts: list[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(replaced(part, forward=_recompute(part.forward)))
        yield


def _recompute(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward_copies(*args: Any, **kwargs: Any) -> Tensor:
        """A block may overwrite its inputs: it gets copies, so that they are unchanged when it is recomputed."""
        copies = [_copy(value) for value in args]
        return forward(*copies, **{name: _copy(value) for name, value in kwargs.items()})

    def run(*args: Any, **kwargs: Any) -> Tensor:
        # transformer_options names the running block and changes as the model runs: recomputing needs it as it is now.
        fixed = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        fixed_kw: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}
        return checkpoint(forward_copies, *fixed, use_reentrant=False, **fixed_kw)

    return run


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
