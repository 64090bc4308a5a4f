"""The narrow autoencoder: the layers of TAESD with fewer channels, so that zero padding to TAESD's 64 is exact.

TAESD (O. Boer Bohan) has no normalisation layers: a channel whose weights are all zero stays zero, and a residual block
without convolutions is the same as one whose convolutions are all zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, FLOW_CHANNELS = 4, 16  # of a latent in SD1.x's layout and in SD3's
ENCODER_WIDTHS = (16, 32, 64, 64)
DECODER_WIDTHS = (64, 64, 32, 16)


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    """3 x 3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Clamp(nn.Module):
    """TAESD's soft limit of the latents to -3..3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Limit x."""
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """TAESD's residual block; `empty` leaves out the convolutions (stored as zeros in the wide model)."""

    def __init__(self, width: int, empty: bool = False) -> None:
        super().__init__()
        if not empty:
            self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """relu(conv(x) + x)."""
        return F.relu(self.conv(x) + x if hasattr(self, "conv") else x)


def make_encoder(channels: int = CHANNELS) -> nn.Sequential:
    """Encoder [B,3,H,W] in 0..1 -> latents [B,channels,H/8,W/8], with TAESD's layer numbers."""
    a, b, c, d = ENCODER_WIDTHS

    def down(inputs: int, outputs: int) -> nn.Conv2d:
        return conv(inputs, outputs, stride=2, bias=False)

    return nn.Sequential(
        conv(3, a),
        Block(a, empty=True),
        down(a, b),
        Block(b, empty=True),
        Block(b, empty=True),
        Block(b, empty=True),
        down(b, c),
        Block(c),
        Block(c, empty=True),
        Block(c, empty=True),
        down(c, d),
        Block(d),
        Block(d),
        Block(d, empty=True),
        conv(d, channels),
    )


def make_decoder(channels: int = CHANNELS) -> nn.Sequential:
    """Decoder [B,channels,h,w] -> picture [B,3,8h,8w] around 0..1, with TAESD's layer numbers."""
    d, c, b, a = DECODER_WIDTHS

    def up(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), conv(inputs, outputs, bias=False)]

    return nn.Sequential(
        Clamp(),
        conv(channels, d),
        nn.ReLU(),
        Block(d),
        Block(d),
        Block(d, empty=True),
        *up(d, c),
        Block(c),
        Block(c, empty=True),
        Block(c, empty=True),
        *up(c, b),
        Block(b),
        Block(b, empty=True),
        Block(b, empty=True),
        *up(b, a),
        Block(a, empty=True),
        conv(a, 3),
    )


@torch.no_grad()
def initialise(encoder: nn.Sequential, decoder: nn.Sequential, seed: int) -> None:
    """Kaiming weights; small last layers, so that latents start near unit size and pictures near grey."""
    generator = torch.Generator().manual_seed(seed)
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    for block in [*encoder.modules(), *decoder.modules()]:
        if isinstance(block, Block) and hasattr(block, "conv"):
            block.conv[4].weight.mul_(0.3)
    encoder[-1].weight.mul_(0.6)
    decoder[-1].weight.mul_(0.15)
    decoder[-1].bias.fill_(0.5)
