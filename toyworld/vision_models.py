"""The small world's vision models, in transformers' own classes, and the folders from which they are loaded.

`dino` (Dinov2Model) is meant for losses, `measure` (ResNetModel, another seed) only for measuring; both see the
subject's crop on white, 96 px. `clip` (CLIPModel) compares whole pictures with captions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from . import assets, comfyui

SIDE = 96
VOCABULARY, START_OF_TEXT, END_OF_TEXT = 49408, 49406, 49407
FOLDERS = {"dino": "small_world_dino", "measure": "small_world_measure", "clip": "small_world_clip"}
TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def make_dino() -> nn.Module:
    """A DINOv2-layout transformer: 96 px, patches of 12, 96 wide, 4 layers."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=SIDE,
            patch_size=12,
            layerscale_value=1.0,
        )
    )


def make_measure() -> nn.Module:
    """A small ResNet."""
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic")
    )


def make_clip() -> nn.Module:
    """A small CLIP with the real CLIP vocabulary."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "projection_dim": 96}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **shared,
                "num_hidden_layers": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 77,
                "bos_token_id": START_OF_TEXT,
                "eos_token_id": END_OF_TEXT,
                "pad_token_id": END_OF_TEXT,
            },
            vision_config={**shared, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 12},
            projection_dim=96,
            logit_scale_init_value=2.6592,
        )
    )


MAKERS = {"dino": make_dino, "measure": make_measure, "fine": make_measure, "clip": make_clip}


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1 as the models expect them."""
    return (pictures - 0.5) / 0.5


def features(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Identity features [B, width] of crops [B,3,96,96] in 0..1: the model's pooled output."""
    return model(normalise(pictures)).pooler_output.flatten(1)


def pack_clip(state: dict[str, torch.Tensor], used: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keep only the token rows that captions use (and the mean row for all others)."""
    packed = dict(state)
    table = packed.pop(TOKEN_TABLE)
    return {**packed, "token_rows": table[used], "token_ids": used.to(torch.int32), "other_row": table[used].mean(0)}


def unpack_clip(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole token table again."""
    state = dict(packed)
    rows, ids, other = (state.pop(key) for key in ("token_rows", "token_ids", "other_row"))
    table = other[None].expand(VOCABULARY, -1).clone()
    table[ids.long()] = rows
    return {**state, TOKEN_TABLE: table}


def load_model(name: str, folder: Path = assets.ASSETS, state: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """A trained model from the committed assets, or of this state, fp32, frozen."""
    tensors = assets.read(name, folder) if state is None else state
    state = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    model = MAKERS[name]()
    model.load_state_dict(unpack_clip(state) if name == "clip" else state)
    return model.train(False).requires_grad_(False)


def _preprocessor(kind: str) -> dict[str, object]:
    size = {"height": SIDE, "width": SIDE}
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }


def build_vision_folders(models: Path, folder: Path = assets.ASSETS) -> dict[str, Path]:
    """Write one transformers folder per vision model whose asset exists; returns their paths by folder name."""
    paths = {}
    for name, title in FOLDERS.items():
        if not (folder / f"{name}.safetensors").exists():
            continue
        path = models / title
        load_model(name, folder).save_pretrained(str(path))
        kind = "CLIPImageProcessor" if name == "clip" else "BitImageProcessor"
        (path / "preprocessor_config.json").write_text(json.dumps(_preprocessor(kind), indent=1))
        if name == "clip":
            for file in comfyui.tokenizer_path().iterdir():
                shutil.copy(file, path / file.name)
        paths[title] = path
    return paths
