"""The flow transformer: ComfyUI's own MMDiT (SD3's layout) of depth 4, and its checkpoint for the unmodified loader.

ComfyUI reads the depth from the file: 64 channels and one head per block. Only what reads the text is narrower than in
the file: the text encoder is the first world's, 96 wide, and its repetition to 768 is divided out again in the weights
that read it. Where SD3 has two more text encoders, the file has zeros.
"""

from __future__ import annotations

import torch
from torch import nn

from .autoencoder import FLOW_CHANNELS
from .networks import CONTEXT, END_OF_TEXT, TextEncoder, TorchLayers
from .widen import TEXT_REPEATS, Tensors, part_of, rounded, widen_autoencoder, widen_text

DEPTH, PATCH = 4, 2
WIDTH = 64 * DEPTH
SHIFT = 3.0  # of ComfyUI's levels of noise for SD3
POSITIONS = 64  # patches of a side that the table of positions has: 1024 px
SD3_CONTEXT, SD3_POOLED = 4096, 2048
# How ComfyUI's VAE output becomes what an SD3 network reads: (latent - offset) * factor.
SD3_OFFSET, SD3_FACTOR = 0.0609, 1.5305
# Layers at the ends, what modulates the blocks and all vectors are trained by Adam, the blocks' matrices by Muon.
BY_MUON = (".attn.qkv.weight", ".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")


def positions(side: int = POSITIONS, width: int = WIDTH) -> torch.Tensor:
    """Sines and cosines of a patch's column and row, [1, side * side, width]."""
    rates = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([waves.sin(), waves.cos()], 1).float()
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, width)


def make_mmdit(context: int = CONTEXT, pooled: int = CONTEXT, depth: int = DEPTH) -> nn.Module:
    """The network at its start: blocks that add nothing and a zero answer."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    network = MMDiT(
        input_size=None,
        patch_size=PATCH,
        in_channels=FLOW_CHANNELS,
        out_channels=FLOW_CHANNELS,
        depth=depth,
        adm_in_channels=pooled,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": context, "out_features": 64 * depth},
        },
        num_patches=POSITIONS**2,
        pos_embed_max_size=POSITIONS,
        qk_norm="rms",
        dtype=torch.float32,
        operations=TorchLayers,
    )
    initialise(network)
    return network


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Xavier's start for matrices; zeros where a block is added and in the last layer."""
    for name, parameter in network.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter.flatten(1))
        else:
            parameter.fill_(1)
    network.pos_embed.copy_(positions(width=network.hidden_size))


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for Adam)."""
    matrices, rest = [], []
    for name, parameter in network.named_parameters():
        (matrices if name.endswith(BY_MUON) else rest).append(parameter)
    return matrices, rest


def noise_share(u: torch.Tensor) -> torch.Tensor:
    """Share of noise at a time u from 0 to 1, as ComfyUI shifts it for SD3."""
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def condition(
    text: TextEncoder, rows: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIP-L gives an SD3 network for prompts as rows of the table: (tokens [B,77,96], pooled [B,96]).

    SD3 reads the last layer's output without its normalisation: channels of very different sizes, which are brought to
    mean 0 and deviation 1 here and by the weights of `context_embedder` in the file.
    """
    hidden = text.hidden(rows)
    end = (rows == text.vocabulary.index(END_OF_TEXT)).int().argmax(1)
    return (hidden - mean) / std, text.final_layer_norm(hidden[torch.arange(len(rows)), end])


def widen_mmdit(narrow: Tensors, mean: torch.Tensor, std: torch.Tensor) -> Tensors:
    """Tensors of the network -> SD3's, fp16, with the text's mean and deviation in the weights that read it."""
    wide = {key: value.half() for key, value in narrow.items()}
    reading = narrow["context_embedder.weight"].float() / std.float()
    bias = narrow["context_embedder.bias"].float() - reading @ mean.float()
    wide["context_embedder.bias"] = bias.half()
    readers = {
        "context_embedder.weight": (reading, SD3_CONTEXT),
        "y_embedder.mlp.0.weight": (narrow["y_embedder.mlp.0.weight"], SD3_POOLED),
    }
    for key, (value, inputs) in readers.items():
        read = rounded(value, 1 / TEXT_REPEATS).repeat_interleave(TEXT_REPEATS, 1)
        wide[key] = torch.cat([read, read.new_zeros(len(read), inputs - read.shape[1])], 1)
    wide["pos_embed"] = positions(width=len(narrow["x_embedder.proj.weight"])).half()
    return wide


def as_stored(narrow: Tensors) -> Tensors:
    """The narrow tensors network.*, encoder.*, ... in fp32 with the rounding of the wide fp16 file."""
    network, mean, std = part_of(narrow, "network."), narrow["context.mean"].float(), narrow["context.std"].float()
    wide = {key: value.float() for key, value in widen_mmdit(network, mean, std).items()}
    reading = wide["context_embedder.weight"][:, : TEXT_REPEATS * len(mean) : TEXT_REPEATS] * TEXT_REPEATS
    wide["context_embedder.weight"] = reading * std
    wide["context_embedder.bias"] = wide["context_embedder.bias"] + reading @ mean
    pooled = wide["y_embedder.mlp.0.weight"][:, : TEXT_REPEATS * len(mean) : TEXT_REPEATS]
    wide["y_embedder.mlp.0.weight"] = pooled * TEXT_REPEATS
    rest = {key: value for key, value in narrow.items() if not key.startswith("network.")}
    small = {k: v.half().float() if k.startswith(("encoder.", "decoder.")) else v.float() for k, v in rest.items()}
    return small | {f"network.{key}": value for key, value in wide.items()}


def checkpoint(narrow: Tensors, vocabulary: list[int]) -> Tensors:
    """The whole SD3 checkpoint from the narrow tensors network.*, text.*, encoder.*, decoder.*, latent.shift/scale."""
    autoencoder = {key: value for key, value in narrow.items() if key.startswith(("encoder.", "decoder."))}
    shift, scale = float(narrow["latent.shift"]), float(narrow["latent.scale"])
    parts = {
        "model.diffusion_model.": widen_mmdit(
            part_of(narrow, "network."), narrow["context.mean"], narrow["context.std"]
        ),
        "text_encoders.clip_l.transformer.": widen_text(part_of(narrow, "text."), vocabulary),
        "first_stage_model.": widen_autoencoder(autoencoder, shift, scale, SD3_FACTOR, SD3_OFFSET),
    }
    return {prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.items()}
