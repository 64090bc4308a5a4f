"""An image of the new prompt while its embedding is learned: the subject so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...prompt.conditioning import Conditioning, Placement, with_room, with_tail
from ...session.session import GuiderDenoiser
from .. import hiper

STEPS = 10  # of Euler, with guidance: twenty model calls, as much as seven updates
NEW, EMPTY = "new prompt", "empty prompt"


@dataclass(frozen=True)
class SoFar:
    """target: the new prompt, of one entry; negative: what it is guided away from, or None for no guidance."""

    target: Conditioning
    negative: Conditioning | None
    cfg: float
    seed: int

    def prompts(self, tokens: int, placement: Placement) -> dict[str, Conditioning]:
        """The prompts that the training's session needs besides the source prompt, by role."""
        empty = {} if self.negative is None else {EMPTY: self.negative}
        return {NEW: with_room(self.target, tokens, placement), **empty}

    @torch.no_grad()
    def latent(self, denoiser: GuiderDenoiser, h: Tensor, x0: Tensor) -> Tensor:
        """A sample [1, C, h, w] of the new prompt with HiPer's 0.8 h, in the model's own latent space."""
        guided = denoiser.of(NEW)
        context = with_tail(guided.context.to(h), hiper.SCALE * h)
        unguided = None if self.negative is None else denoiser.of(EMPTY)
        timesteps = torch.linspace(len(denoiser.sigmas) - 1, 0, STEPS + 1).round().long()
        levels = torch.cat([denoiser.sigmas[timesteps[:-1]], torch.zeros(1)]).to(x0)
        noise = torch.randn(x0[:1].shape, generator=torch.Generator().manual_seed(self.seed)).to(x0)
        x = denoiser.noised(torch.zeros_like(noise), noise, levels[:1])
        for level, lower in zip(levels[:-1, None], levels[1:], strict=True):
            denoised = guided.denoised(x, level, context)
            if unguided is not None:
                empty = unguided.denoised(x, level)
                denoised = empty + self.cfg * (denoised - empty)
            x = x + (x - denoised) / level * (lower - level)
        return x
