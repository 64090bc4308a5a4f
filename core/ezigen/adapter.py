"""EZIGen (Duan et al. 2024, arXiv 2409.08091): subject features of the UNet itself, and the adapter that reads them.

The UNet that generates also encodes the subject: shown the subject's image at t = 1, it is asked for the normed
input F_i of each of its self-attentions. In each transformer block a second attention, between self- and
cross-attention, sees the image in the making and the subject together:

    n = LN_i(h),   m = [n ; w_i F_i],   h <- h + n + W_o softmax(Q(n) K(m)^T / sqrt(d)) V(m) + b_o

LN_i, Q, K, V, W_o, b_o of every block and the numbers w are the adapter, and are all that is trained: 113 tensors for
the 16 blocks of SD2.1-base. Everything else stays as it is, and with the adapter off nothing is left of it: "off" means
that the attention is skipped, because without a subject it would still add n and its own attention.

Source: the authors' code. Its n beside the attention's output is their residual connection, part of the weights'
contract; F_i is not normed again; several images are joined along the tokens. Deviations, each with its reason:
- places without a subject are hidden from the attention (`present`); theirs attends to features of gray images in
  training, which no sampling ever shows it;
- `strength` takes a part of what the block adds; 1 is theirs, 0 is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUBJECT_TIMESTEP = 1
WEIGHTS = "learnable_weights"  # the published name of w
LINEARS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Layer:
    """A transformer block of a UNet: its published (diffusers) name, its width C and its number of heads."""

    name: str
    width: int
    heads: int


@dataclass(frozen=True)
class SubjectTokens:
    """What the adapter reads: for each layer [B or 1, R * N_i, C_i], of R images of a subject or of several.

    present: [B or 1, R], False for a place that is only filled up; None when every place has its image.
    """

    layers: tuple[Tensor, ...]
    present: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> SubjectTokens:
        """The same with change(tensor) of each layer's tokens."""
        return SubjectTokens(tuple(map(change, self.layers)), self.present)

    def keys(self, index: int) -> Tensor | None:
        """Which tokens of a layer are there, [B or 1, R * N_i]; None for all."""
        if self.present is None:
            return None
        return self.present.repeat_interleave(self.layers[index].shape[1] // self.present.shape[1], 1)


def joined(captured: Sequence[Tensor]) -> SubjectTokens:
    """Tokens of R images for one sample: [R, N_i, C_i] of each layer -> [1, R * N_i, C_i]."""
    return SubjectTokens(tuple(features.reshape(1, -1, features.shape[-1]) for features in captured))


def batched(captured: Sequence[Tensor], counts: Sequence[int]) -> SubjectTokens:
    """Tokens for a batch whose samples have counts[b] images each: [sum(counts), N_i, C_i] -> [B, R * N_i, C_i].

    R is the largest of the counts; what is missing is filled with zeros and hidden.
    """
    places, device = max(counts), captured[0].device
    present = torch.arange(places, device=device) < torch.tensor(list(counts), device=device)[:, None]
    layers = []
    for features in captured:
        filled = features.new_zeros(len(counts), places, *features.shape[1:])
        filled[present] = features
        layers.append(filled.flatten(1, 2))
    return SubjectTokens(tuple(layers), None if bool(present.all()) else present)


def dropped(tokens: SubjectTokens, drop: Tensor) -> SubjectTokens:
    """The tokens with those of the samples in drop [B] set to zero, which is the published sign for "no subject"."""
    return tokens.map(lambda features: features * (~drop).to(features).view(-1, 1, 1))


class SubjectAttention(nn.Module):
    """The adapter of one transformer block, with the published parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.adapter_norm = nn.LayerNorm(width)
        parts: dict[str, nn.Module] = {name: nn.Linear(width, width, bias=False) for name in LINEARS}
        self.adapter = nn.ModuleDict({**parts, "to_out": nn.ModuleList([nn.Linear(width, width)])})

    def forward(self, h: Tensor, subject: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """What is added to h [B, T, C]; subject [B or 1, M, C], keys [B or 1, M]: which of the M tokens are there."""
        norm = self.adapter_norm
        n = F.layer_norm(h, (h.shape[-1],), norm.weight.to(h), norm.bias.to(h), norm.eps)
        q, k, v = (_linear(self.adapter[name], n) for name in LINEARS)
        mask = None
        if subject is not None:
            # Of m = [n ; w F] the subject's part is the same for the whole batch, and is projected once.
            batch, of_subject = h.shape[0], (_linear(self.adapter[name], subject.to(n)) for name in LINEARS[1:])
            k, v = (torch.cat([own, its.expand(batch, -1, -1)], 1) for own, its in zip((k, v), of_subject, strict=True))
            if keys is not None:
                own = keys.new_ones(batch, n.shape[1])
                mask = torch.cat([own, keys.expand(batch, -1)], 1)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(*map(self._heads, (q, k, v)), attn_mask=mask)
        (out,) = self.adapter["to_out"].children()
        return n + _linear(out, mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """In the precision, and on the device, of x: an adapter is kept apart from the model that it works in."""
    own = cast(nn.Linear, layer)
    return F.linear(x, own.weight.to(x), None if own.bias is None else own.bias.to(x))


class Adapter(nn.Module):
    """The adapters of all blocks of a UNet, in the order in which it runs them, and w."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.described = tuple(layers)
        self.layers = nn.ModuleList(SubjectAttention(layer.width, layer.heads) for layer in layers)
        self.learnable_weights = nn.Parameter(torch.ones(len(self.described)))

    def forward(self, index: int, h: Tensor, tokens: SubjectTokens | None, strength: float = 1.0) -> Tensor:
        """h [B, T, C] behind the self-attention of layer `index`, with what its adapter adds."""
        subject, keys = None, None
        if tokens is not None:
            features = tokens.layers[index]
            subject, keys = self.learnable_weights[index].to(features) * features, tokens.keys(index)
        added = self.layers[index](h, subject, keys)
        return h + added if strength == 1.0 else h + strength * added

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter by its published name."""
        found = {WEIGHTS: self.learnable_weights}
        for layer, module in zip(self.described, self.layers, strict=True):
            found |= {f"{layer.name}.{name}": parameter for name, parameter in module.named_parameters()}
        return found

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """The published start: copies of each block's self-attention and its norm, and w = 1.

        weights: the UNet's own, by published names (`<layer>.attn1.to_q.weight`, `<layer>.norm1.bias`).
        """
        for name, parameter in self.named().items():
            if name != WEIGHTS:
                source = name.replace(".adapter_norm.", ".norm1.").replace(".adapter.", ".attn1.")
                parameter.copy_(weights[source])
        self.learnable_weights.fill_(1.0)

    def owners(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Every parameter's published name, the module that holds it, and its name there."""
        names = {id(parameter): name for name, parameter in self.named().items()}
        for module in self.modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                yield names[id(parameter)], module, own

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError when these are not the tensors of an adapter for this UNet."""
        own = self.named()
        missing, other = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or other:
            raise ValueError(
                f"The adapter has {len(tensors)} tensors, this model's UNet takes {len(own)}:"
                f"{_some('missing', missing)}{_some('too many', other)}. Connect the model that the adapter was "
                "trained for (SD2.1-base for the published one)."
            )
        for name, parameter in own.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"The adapter's {name} is {_size(tensors[name])}, this model's UNet takes {_size(parameter)}: "
                    "connect the model that the adapter was trained for (SD2.1-base for the published one)."
                )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the numbers of a file; ValueError as in check()."""
        self.check(tensors)
        for name, parameter in self.named().items():
            parameter.copy_(tensors[name])


def _some(what: str, names: Sequence[str]) -> str:
    return f" {what}: {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}" if names else ""


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))
