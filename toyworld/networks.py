"""The narrow UNet and text encoder, the noise schedule, and a plain DDIM sampler for evaluations.

The UNet is ComfyUI's own `UNetModel` with 64 instead of 320 channels and a context of 96 instead of 768; the text
encoder has CLIP's layers, 96 wide with twelve heads of 8. `widen.py` turns both into the SD1.x widths without changing
the function they compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 64
WIDE_CHANNELS = 320
CONTEXT = 96
HEADS, HEAD_WIDTH = 12, 8
TEXT_LAYERS = 2
ROWS = 77
END_OF_TEXT = 49407
LATENT_SIDE = 12
# Two resolutions, one residual block each, attention in input, middle and output blocks.
TOPOLOGY = {
    "channel_mult": [1, 1], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip


def alphas_cumprod() -> torch.Tensor:
    """SD1.x noise schedule: cumulative signal variance at timesteps 0..999."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class TorchLayers:
    """torch's own layers, in the form in which UNetModel asks for its operations (they initialise their weights)."""

    Linear, Conv2d, GroupNorm, LayerNorm, Embedding = nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding

    @staticmethod
    def conv_nd(dimensions: int, *arguments: object, **options: object) -> nn.Conv2d:
        """Only two dimensions are needed."""
        return nn.Conv2d(*arguments, **options)


def make_unet(
    operations: object = TorchLayers, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> nn.Module:
    """The narrow UNet. Its time embedding keeps the 320 sinusoids of SD1.x, which widening cannot replicate."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    topology = {key: list(value) if isinstance(value, list) else value for key, value in TOPOLOGY.items()}
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        model_channels=CHANNELS,
        out_channels=4,
        num_heads=8,
        use_spatial_transformer=True,
        context_dim=CONTEXT,
        legacy=False,
        dtype=dtype,
        device=device,
        operations=operations,
        **topology,
    )
    unet.model_channels = WIDE_CHANNELS
    unet.time_embed[0] = operations.Linear(WIDE_CHANNELS, 4 * CHANNELS, dtype=dtype, device=device)
    return unet


@torch.no_grad()
def zero_ends(unet: nn.Module) -> None:
    """Start from residual branches that add nothing and from a zero prediction."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in ("out_layers.3.", "proj_out.", "out.2.")):
            parameter.zero_()


class TextLayer(nn.Module):
    """One layer of CLIP's text transformer, with transformers' parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(CONTEXT), nn.LayerNorm(CONTEXT)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(CONTEXT, CONTEXT) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(CONTEXT, 4 * CONTEXT), "fc2": nn.Linear(4 * CONTEXT, CONTEXT)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal self-attention and MLP on [B, rows, 96]."""
        batch, rows, _ = x.shape
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).view(batch, rows, HEADS, HEAD_WIDTH).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, rows, CONTEXT)
        x = x + self.self_attn["out_proj"](mixed)
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """CLIP-like text encoder over the token ids that captions use; every other id shares one trained row, the last.

    `vocabulary` lists CLIP's ids. Inputs are rows of the small table, see `rows_of`.
    """

    def __init__(self, vocabulary: list[int]) -> None:
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.token_embedding = nn.Embedding(len(vocabulary) + 1, CONTEXT)
        self.position_embedding = nn.Embedding(ROWS, CONTEXT)
        nn.init.normal_(self.token_embedding.weight, 0, 0.3)
        nn.init.normal_(self.position_embedding.weight, 0, 0.05)
        self.layers = nn.ModuleList([TextLayer() for _ in range(TEXT_LAYERS)])
        self.final_layer_norm = nn.LayerNorm(CONTEXT)
        table = torch.full((END_OF_TEXT + 1,), len(vocabulary), dtype=torch.long)
        table[torch.tensor(self.vocabulary)] = torch.arange(len(vocabulary))
        self.register_buffer("table", table, persistent=False)

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor:
        """CLIP token ids -> rows of this encoder's table."""
        return self.table[ids]

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """Table rows [B, 77] -> the last layer's output [B, 77, 96], not yet normalised."""
        x = self.token_embedding(rows) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Table rows [B, 77] -> context [B, 77, 96]."""
        return self.final_layer_norm(self.hidden(rows))


def token_ids(tokenizer: object, captions: list[str]) -> torch.Tensor:
    """CLIP token ids [B, 77], padded with the end token as ComfyUI does for SD1.x."""
    encoded = tokenizer(captions, truncation=True, max_length=ROWS)["input_ids"]
    return torch.tensor([ids + [END_OF_TEXT] * (ROWS - len(ids)) for ids in encoded])


@torch.no_grad()
def sample(
    unet: nn.Module,
    context: torch.Tensor,
    empty: torch.Tensor,
    seed: int,
    steps: int = 25,
    guidance: float = 4.0,
    part: int = 48,
) -> torch.Tensor:
    """DDIM (eta 0) with classifier-free guidance: contexts [B,77,96] -> normalised latents [B,4,12,12]."""
    alphas = alphas_cumprod()
    x = torch.randn(len(context), 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(999, 0, steps + 1).long().tolist()
    finished = []
    for latents, text in zip(x.split(part), context.split(part), strict=True):
        both = torch.cat([text, empty.expand(len(text), -1, -1)])
        for now, then in zip(times[:-1], times[1:], strict=True):
            prediction = unet(torch.cat([latents, latents]), torch.full((2 * len(latents),), float(now)), context=both)
            with_text, without = prediction.chunk(2)
            epsilon = without + guidance * (with_text - without)
            alpha, alpha_then = alphas[now], alphas[then] if then > 0 else torch.tensor(1.0)
            clean = (latents - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
            latents = alpha_then.sqrt() * clean + (1 - alpha_then).sqrt() * epsilon
        finished.append(latents)
    return torch.cat(finished)
