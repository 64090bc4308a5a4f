"""A diffusers folder of Stable Diffusion's parts with tiny random networks, and tiny sets of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw

SIZE = 32  # of images; latents are 8 x 8
START, END = "<|startoftext|>", "<|endoftext|>"
COLOURS = ("red", "green", "blue", "orange", "purple", "teal")


def write_model(folder: Path, **scheduler: Any) -> Path:
    """The folder, as published ones are laid out."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = _write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=(2, 4),
            cross_attention_dim=16,
            use_linear_projection=True,
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.18215,
        ).save_pretrained(folder / "vae")
        text = CLIPTextConfig(
            vocab_size=words,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=words - 2,
            eos_token_id=words - 1,
        )
        CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **scheduler}
    DDPMScheduler(**levels).save_pretrained(folder / "scheduler")
    return folder


def _write_tokenizer(folder: Path) -> int:
    """A token for each byte, within a word and at its end; returns how many there are."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **settings}))
    return len(words)


def write_subjects(folder: Path, subjects: int = 3, pictures: int = 2) -> Path:
    """Subjects with captions and masks, each a disc of a colour on a ground of its own."""
    for subject in range(subjects):
        place = folder / f"ball_{subject}"
        place.mkdir(parents=True)
        for number in range(pictures):
            picture = Image.new("RGB", (48, 40), COLOURS[(subject + number + 1) % len(COLOURS)])
            mask = Image.new("L", picture.size)
            box = (6 + 3 * number, 8, 26 + 3 * number, 28)
            ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[subject])
            ImageDraw.Draw(mask).ellipse(box, fill=255)
            picture.save(place / f"{number}.png")
            mask.save(place / f"{number}.mask.png")
            (place / f"{number}.txt").write_text(f"a {COLOURS[subject]} ball")
    return folder


def column_runs(mask: numpy.ndarray) -> list[int]:
    """Run lengths along the columns, beginning outside."""
    counts, inside, run = [], False, 0
    for value in mask.T.ravel().tolist():
        if value != inside:
            counts.append(run)
            inside, run = value, 0
        run += 1
    return [*counts, run]
