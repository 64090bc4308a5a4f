"""An image of the new prompt while its embedding is learned: the subject so far."""

import torch
from torch import Tensor

from ...prompt.conditioning import with_tail
from ...session.session import GuiderDenoiser
from .. import hiper

STEPS = 10  # of Euler, with guidance: twenty model calls, as much as seven updates
NEW = "new prompt"


@torch.no_grad()
def so_far(denoiser: GuiderDenoiser, h: Tensor, x0: Tensor, cfg: float | None, seed: int) -> Tensor:
    """A sample [1, C, h, w] of the prompt NEW with HiPer's 0.8 h, in the model's own latent space; guided away from the
    session's negative prompt by cfg, unless that is None.
    """
    guided = denoiser.of(NEW)
    context = with_tail(guided.context.to(h), hiper.SCALE * h)
    timesteps = torch.linspace(len(denoiser.sigmas) - 1, 0, STEPS + 1).round().long()
    levels = torch.cat([denoiser.sigmas[timesteps[:-1]], torch.zeros(1)]).to(x0)
    noise = torch.randn(x0[:1].shape, generator=torch.Generator().manual_seed(seed)).to(x0)
    x = denoiser.noised(torch.zeros_like(noise), noise, levels[:1])
    for level, lower in zip(levels[:-1, None], levels[1:], strict=True):
        denoised = guided.denoised(x, level, context)
        if cfg is not None:
            empty = denoiser.of("negative").denoised(x, level)
            denoised = empty + cfg * (denoised - empty)
        x = x + (x - denoised) / level * (lower - level)
    return x
