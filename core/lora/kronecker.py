"""LoKr (Yeh et al., ICLR 2024, arXiv 2309.14859), sec. 3: h = W x + (C (x) D) x, with (x) the Kronecker product.

C [a, b] is small, D [rows / a, columns / b] holds most weights; both are whole matrices, as in ComfyUI's own adapter
(LoKrAdapter), whose sizes, start and names in files these are. The product is never formed.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .low_rank import Layer, module_of, sizes


def divisor(size: int, factor: int) -> int:
    """The largest divisor of a size, up to `factor` and to its root."""
    return max(d for d in range(1, min(factor, math.isqrt(size)) + 1) if size % d == 0)


class Kronecker(nn.Module):
    """The factors C and D of one linear layer; C starts at zero. factor: the largest side of C."""

    def __init__(self, layer: Layer, factor: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = sizes(layer)
        device = torch.as_tensor(module_of(layer).weight).device
        a, b = divisor(rows, factor), divisor(columns, factor)
        large = torch.rand(rows // a, columns // b, generator=generator) * 2 - 1
        self.small = nn.Parameter(torch.zeros(a, b, device=device))
        self.large = nn.Parameter((large * (columns // b) ** -0.5).to(device))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x.unflatten(-1, (self.small.shape[1], -1)), self.large.to(x.dtype))
        return (self.small.to(x.dtype) @ hidden).flatten(-2)

    def tensors(self, path: str) -> dict[str, Tensor]:
        named = {f"{path}.lokr_w1": self.small, f"{path}.lokr_w2": self.large}
        return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}
