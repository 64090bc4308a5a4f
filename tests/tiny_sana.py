"""A diffusers folder of Sana with tiny random networks: as published in everything but its widths and its words."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .tiny_models import randomise

if TYPE_CHECKING:  # a server that makes these models knows the pack by another name
    from likeness.toolbox.server import Server

WIDTHS = (4, 8, 8, 8, 16, 32)  # six levels, as published: samples are 32 times smaller than images
CHANNELS, CAPTION = 8, 16
SCALE = 0.41407
NAME, ITERATIONS, GRAD_STEPS = "tiny_sana", 4, 3  # in a server, and of an optimisation there


def transformer(seed: int = 0, layers: int = 2) -> nn.Module:
    """Two blocks instead of 20, four heads instead of 70."""
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=CAPTION,
        sample_size=4,
    )
    randomise(network, seed)
    return network


def autoencoder(seed: int = 0) -> nn.Module:
    """With both kinds of blocks that the published one has."""
    from diffusers import AutoencoderDC

    kinds = (*("ResBlock",) * 5, "EfficientViTBlock")
    scales = (*((),) * 5, (5,))
    network = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=16,  # with fewer numbers all may be below zero, where its linear attention jumps
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=SCALE,
    )
    randomise(network, seed, gain=1.0)
    return network


def text_encoder(words: int, seed: int = 0) -> nn.Module:
    """Gemma 2 with two layers."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=words,
        hidden_size=CAPTION,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4096,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    network = Gemma2Model(config)
    randomise(network, seed)
    return network


def tokenizer():
    """A token for each byte; it begins a text with <bos>, as Gemma's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    table = {word: number for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    fast = Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", table["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def write(folder: Path, seed: int = 0) -> Path:
    """The whole folder, as SanaPipeline.save_pretrained() writes it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        networks = {
            "transformer": transformer(seed),
            "vae": autoencoder(seed + 1),
            "text_encoder": text_encoder(len(words), seed + 2),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    SanaPipeline(tokenizer=words, scheduler=scheduler, **networks).save_pretrained(folder)
    return folder


@functools.cache
def _written(seed: int) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="likeness-sana-", ignore_cleanup_errors=True)
    write(Path(folder.name), seed)
    return folder


def folder(seed: int = 0) -> Path:
    """One for all tests of the process, which leave it as it is."""
    return Path(_written(seed).name)


def in_server(server: Server) -> dict[tuple[str, str], Any]:
    """The settings with which a shipped graph takes the folder, which lies in the server's own models afterwards."""
    folder = server.base / "models" / "diffusers" / NAME
    if not folder.exists():
        write(folder)
    learning = {("LikenessOptimizeLora", "iterations"): ITERATIONS, ("LikenessOptimizeLora", "grad_steps"): GRAD_STEPS}
    return {("LikenessLoadSana", "name"): NAME, **learning}


def edit(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
