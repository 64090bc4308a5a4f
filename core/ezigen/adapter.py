"""EZIGen (Duan et al. 2024, arXiv 2409.08091): subject features from the UNet itself, and the adapter that reads them.

The generating UNet also encodes the subject: it receives the subject's image at t = 1, and the normed input F_i of each
of its self-attentions is captured. In each transformer block a second attention, between self- and cross-attention,
attends to the generated image and the subject together:

    n = LN_i(h),   m = [n ; w_i F_i],   h <- h + n + W_o softmax(Q(n) K(m)^T / sqrt(d)) V(m) + b_o

LN_i, Q, K, V, W_o, b_o of every block and the vector w form the adapter. Only the adapter is trained: 113 tensors for
the 16 blocks of SD2.1-base. With the adapter off, the model is unchanged: "off" skips the attention, because without a
subject it would still add n and its own attention.

Source: the reference code. The extra n is its residual connection, which the weights rely on; F_i is not normed again;
several images are concatenated along the tokens. Deviations, each with its reason:
- places without a subject are masked out of the attention (`present`); in training the reference code attends to
  features of gray images instead, which never occur in sampling;
- `strength` scales what the block adds; 1 is the reference code, 0 is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

SUBJECT_TIMESTEP = 1
WEIGHTS = "learnable_weights"  # published name of w
LINEARS = ("to_q", "to_k", "to_v")
Projected = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class Layer:
    """A transformer block of a UNet: published (diffusers) name, width C and number of heads."""

    name: str
    width: int
    heads: int


@dataclass(frozen=True)
class SubjectTokens:
    """The adapter's input: per layer [B or 1, R * N_i, C_i], from R images of one or several subjects.

    present: [B or 1, R], False for padded places; None if every place has an image.
    """

    layers: tuple[Tensor, ...]
    present: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> SubjectTokens:
        """A copy with change(tensor) applied to each layer's tokens."""
        return SubjectTokens(tuple(map(change, self.layers)), self.present)

    def keys(self, index: int) -> Tensor | None:
        """The mask of a layer's present tokens, [B or 1, R * N_i]; None for all."""
        if self.present is None:
            return None
        return self.present.repeat_interleave(self.layers[index].shape[1] // self.present.shape[1], 1)


def batch_tokens(per_layer: Sequence[Tensor], counts: Sequence[int]) -> SubjectTokens:
    """Tokens for a batch whose sample b has counts[b] images: per layer [sum(counts), N_i, C_i] -> [B, R * N_i, C_i].

    R is the largest count; missing images are padded with zeros and masked.
    """
    device = per_layer[0].device
    present = torch.arange(max(counts), device=device) < torch.tensor(list(counts), device=device)[:, None]
    padded = (pad_sequence(features.split(list(counts)), batch_first=True) for features in per_layer)
    layers = tuple(features.flatten(1, 2) for features in padded)
    return SubjectTokens(layers, None if bool(present.all()) else present)


def drop_subjects(tokens: SubjectTokens, drop: Tensor) -> SubjectTokens:
    """Set the tokens of the samples in drop [B] to zero, the published encoding of "no subject"."""
    return tokens.map(lambda features: features * (~drop).to(features).view(-1, 1, 1))


class SubjectAttention(nn.Module):
    """The adapter of one transformer block, with published parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.adapter_norm = nn.LayerNorm(width)
        parts: dict[str, nn.Module] = {name: nn.Linear(width, width, bias=False) for name in LINEARS}
        self.adapter = nn.ModuleDict({**parts, "to_out": nn.ModuleList([nn.Linear(width, width)])})

    def project(self, subject: Tensor) -> Projected:
        """Keys and values of a subject [B or 1, M, C]: its part of m = [n ; w F] is the same for the whole batch."""
        k, v = (_linear(self.adapter[name], subject) for name in LINEARS[1:])
        return k, v

    def forward(self, h: Tensor, subject: Projected, keys: Tensor | None = None) -> Tensor:
        """The residual for h [B, T, C]; subject: from project(); keys [B or 1, M]: mask of its M tokens."""
        norm = self.adapter_norm
        n = F.layer_norm(h, (h.shape[-1],), norm.weight.to(h), norm.bias.to(h), norm.eps)
        q, k, v = (_linear(self.adapter[name], n) for name in LINEARS)
        batch, mask = h.shape[0], None
        k, v = (
            torch.cat([image_tokens, subject_tokens.expand(batch, -1, -1)], 1)
            for image_tokens, subject_tokens in zip((k, v), subject, strict=True)
        )
        if keys is not None:
            image_tokens = keys.new_ones(batch, n.shape[1])
            mask = torch.cat([image_tokens, keys.expand(batch, -1)], 1)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(*map(self._heads, (q, k, v)), attn_mask=mask)
        (out,) = self.adapter["to_out"].children()
        return n + _linear(out, mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in the precision and on the device of x, since the adapter is stored apart from the model."""
    linear = cast(nn.Linear, layer)
    return F.linear(x, linear.weight.to(x), None if linear.bias is None else linear.bias.to(x))


class Adapter(nn.Module):
    """The adapters of all blocks of a UNet, in execution order, and w."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.described = tuple(layers)
        self.layers = nn.ModuleList(SubjectAttention(layer.width, layer.heads) for layer in layers)
        self.learnable_weights = nn.Parameter(torch.ones(len(self.described)))

    def project(self, index: int, tokens: SubjectTokens, like: Tensor) -> Projected:
        """Keys and values of the subject in layer `index`, the same at each step; in the precision of `like`."""
        features = tokens.layers[index]
        return self.layers[index].project((self.learnable_weights[index].to(features) * features).to(like))

    def forward(
        self,
        index: int,
        h: Tensor,
        tokens: SubjectTokens,
        strength: float = 1.0,
        subject: Projected | None = None,
    ) -> Tensor:
        """Add the adapter's residual to h [B, T, C] after the self-attention of layer `index`. subject: from project(),
        when it is known already.
        """
        delta = self.layers[index](h, subject or self.project(index, tokens, h), tokens.keys(index))
        return h + delta if strength == 1.0 else h + strength * delta

    def published_parameters(self) -> dict[str, nn.Parameter]:
        """By published names, w first, in the order of named_parameters()."""
        found = {WEIGHTS: self.learnable_weights}
        for layer, adapter in zip(self.described, self.layers, strict=True):
            found |= {f"{layer.name}.{part}": parameter for part, parameter in adapter.named_parameters()}
        return found

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """The published initialisation: copies of each block's self-attention and norm, and w = 1.

        weights: the UNet's, by published names (`<layer>.attn1.to_q.weight`, `<layer>.norm1.bias`).
        """
        for name, parameter in self.published_parameters().items():
            if name != WEIGHTS:
                source = name.replace(".adapter_norm.", ".norm1.").replace(".adapter.", ".attn1.")
                parameter.copy_(weights[source])
        self.learnable_weights.fill_(1.0)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError unless these are the tensors of an adapter for this UNet."""
        expected = self.published_parameters()
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or extra:
            raise ValueError(
                f"The adapter has {len(tensors)} tensors, this model's UNet takes {len(expected)}:"
                f"{_some('missing', missing)}{_some('too many', extra)}. Connect the model that the adapter was "
                "trained for (SD2.1-base for the published one)."
            )
        for name, parameter in expected.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"The adapter's {name} is {_size(tensors[name])}, this model's UNet takes {_size(parameter)}: "
                    "connect the model that the adapter was trained for (SD2.1-base for the published one)."
                )

    def load(self, tensors: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Load the tensors of a file, or take them as they are; ValueError as in check()."""
        self.check(tensors)
        names = zip(self.state_dict(), self.published_parameters(), strict=True)
        self.load_state_dict({own: tensors[published] for own, published in names}, assign=assign)


def _some(what: str, names: Sequence[str]) -> str:
    return f" {what}: {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}" if names else ""


def _size(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))
