"""The judge: one small network that reads a scene's attributes and the subject's mask from a 96 px picture.

Self-contained (torch and safetensors only), so that ComfyUI nodes, tests and benchmarks can load this file alone.
Pictures are float [B,3,H,W] in 0..1; other sizes than 96 are resized for the network.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 96
# Number of answers of each head, in the order of world.py's names; an answer 0 that means "none" is counted.
HEADS = {"class": 8, "color": 7, "texture": 4, "background": 7,
         "pattern_color": 3, "angle": 4, "emblem_shape": 4, "emblem_color": 5, "tone": 3}  # fmt: skip
MAIN_HEADS = ("class", "color", "texture", "background")
ASSETS = Path(__file__).resolve().parent / "assets"
WIDTHS = (32, 64, 96, 128)


def _layer(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Judge(nn.Module):
    """Convolutional features at 48, 24, 12 and 6 px; attribute heads on the pooled last ones, mask from all of them."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = WIDTHS
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_layer(3, a, 2, 5), _layer(a, a, 1)),
                nn.Sequential(_layer(a, b, 2), _layer(b, b, 1)),
                nn.Sequential(_layer(b, c, 2), _layer(c, c, 1)),
                nn.Sequential(_layer(c, d, 2), _layer(d, d, 1)),
            ]
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * d, count) for name, count in HEADS.items()})
        self.to_mask = nn.ModuleList([nn.Conv2d(width, 32, 1) for width in WIDTHS])
        self.refine = nn.Sequential(
            nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 3, padding=1)
        )

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pictures [B,3,96,96] -> (answers' logits per head [B, n], mask logits [B, 96, 96])."""
        features, x = [], images * 2 - 1
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        mask = self.to_mask[3](features[3])
        for level in (2, 1, 0):
            mask = F.interpolate(mask, scale_factor=2) + self.to_mask[level](features[level])
        mask = F.pixel_shuffle(self.refine(mask), 2)[:, 0]
        return {name: head(pooled) for name, head in self.heads.items()}, mask

    @torch.no_grad()
    def _answers(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"The judge got pictures of shape {tuple(images.shape)}: it needs [B, 3, H, W] in 0..1.")
        small = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        parts = [self(part) for part in small.split(64)]
        heads = {name: torch.cat([answers[name] for answers, _ in parts]) for name in HEADS}
        return heads, torch.cat([mask for _, mask in parts])

    def attributes(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The likeliest answer of every head, LongTensor [B] each."""
        return {name: logits.argmax(1) for name, logits in self._answers(images)[0].items()}

    def mask(self, images: torch.Tensor) -> torch.Tensor:
        """Probability of subject per pixel, [B, H, W] in 0..1, at the pictures' own size."""
        mask = self._answers(images)[1].sigmoid()[:, None]
        return F.interpolate(mask, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def load_judge(assets_dir: str | Path | None = None) -> Judge:
    """The trained judge in evaluation mode, frozen."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(
        {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(Path(assets_dir or ASSETS) / "judge.safetensors").items()
        }
    )
    return judge.train(False).requires_grad_(False)


def subject_crop(images: torch.Tensor, masks: torch.Tensor, size: int = 64, margin: float = 0.06) -> torch.Tensor:
    """The subject alone on white, [B,3,size,size].

    Cuts the square around the pixels with mask > 0.5, widened by `margin` of its side, and replaces everything outside
    the mask by white. `masks` is [B,H,W] in 0..1. An empty mask gives a white picture. Differentiable in `images`.
    """
    height, width = images.shape[2:]
    on_white = images * masks[:, None] + (1 - masks[:, None])
    boxes = []
    for mask in masks > 0.5:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows) == 0:
            rows, columns = torch.tensor([0, height - 1]), torch.tensor([0, width - 1])
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        side = max(bottom - top, right - left) * (1 + 2 * margin)
        # affine_grid counts from -1 to 1 over the whole picture.
        boxes.append([[side / width, 0, (left + right) / width - 1], [0, side / height, (top + bottom) / height - 1]])
    grid = F.affine_grid(
        torch.tensor(boxes, dtype=images.dtype, device=images.device), [len(images), 3, size, size], align_corners=False
    )
    # Sampling darkness instead of light makes everything beyond the border white.
    return 1 - F.grid_sample(1 - on_white, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
