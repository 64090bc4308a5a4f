"""T-LoRA (Soboleva et al., AAAI 2026, arXiv 2507.05964): a LoRA from one image, with fewer ranks at noisier timesteps.

    h = W x + B S M_t A x - B_0 S_0 M_t A_0 x,    M_t keeps the first r(t) of r ranks,
    r(t) = floor((r - r_min) (T - t) / T) + r_min

Noisy timesteps over-fit first: they learn the background and pose of the one image. A mask needs ranks that are
independent, so B_0 S_0 A_0 are the last r parts of the SVD of a random matrix (normal, deviation 1 / r): orthogonal,
with small singular values. B, S and A train from there without a constraint. Sampling uses the same mask.

Source: tlora/model/lora.py ("ortho_lora", "last") and pipeline_sdxl.py of the reference code, with r_min = r / 2 as in
its settings for SDXL (64 and 32). Deviations, each with its reason:
- the orthogonal factors are drawn by themselves, and the singular values once for each shape of a layer: the same
  distribution without the SVD of every layer, which takes minutes for large models;
- a layer with fewer channels than r has as many ranks as channels.
"""

import functools

import torch
from torch import Tensor, nn

from .low_rank import Layer, LowRank, low_rank_product, sizes

MARKER = "likeness.needs_rank_mask"  # in files of weights trained with the mask


def active_ranks(t: int, count: int, rank: int) -> int:
    """r(t) for T = count timesteps."""
    least = max(1, rank // 2)
    return (rank - least) * (count - t) // count + least


@functools.lru_cache(maxsize=64)
def last_values(rows: int, columns: int, rank: int) -> Tensor:
    """The last `rank` singular values of a random matrix, the largest first; every layer of a shape gets the same."""
    matrix = torch.randn(min(rows, columns), max(rows, columns), generator=torch.Generator().manual_seed(0)) / rank
    squares = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T)
    return squares[:rank].clamp_min(0).sqrt().flip(0).float()


class TimestepRank(LowRank):
    """The factors A, S and B of one linear layer. Its file is a plain LoRA of rank 2 r: rank k of the trained product
    and of the subtracted one are neighbours, so that the first 2 r(t) ranks are the masked product.
    """

    def __init__(self, layer: Layer, rank: int, generator: torch.Generator) -> None:
        rank = min(rank, *sizes(layer))
        super().__init__(layer, rank, generator)
        up, down = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in sizes(layer))
        values = last_values(*sizes(layer), rank).clone()
        with torch.no_grad():
            self.up.copy_(up)
            self.down.copy_(down.T)
        self.values = nn.Parameter(values.to(self.up.device))
        self.first_up, self.first_down = (self.up * self.values).detach(), self.down.detach().clone()
        self.active = rank

    def at(self, t: int, count: int) -> None:
        """Use the ranks of timestep t of `count` from now on."""
        self.active = active_ranks(t, count, len(self.values))

    def product(self) -> tuple[Tensor, Tensor]:
        up = torch.stack([self.up * self.values, -self.first_up], 2).flatten(1)
        return up, torch.stack([self.down, self.first_down], 1).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.product()
        return low_rank_product(x, up[:, : 2 * self.active], down[: 2 * self.active])
