"""Random vision models, small, written to disk as their libraries write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "on", "sand", "grass"]
CLIP_SIDE, DINO_SIDE = 32, 28


def pictures(count: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """Smooth random images [count, height, width, 3] in 0..1: noise would vanish in a resize."""
    coarse = torch.rand((count, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return fine.clamp(0.0, 1.0).movedim(1, -1).contiguous()


def seeded(make, seed: int = 0):
    """make() with its random weights drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().train(False)


def clip_config():
    from transformers import CLIPConfig

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ends = {"bos_token_id": len(WORDS), "eos_token_id": len(WORDS) + 1, "pad_token_id": len(WORDS) + 1}
    text = {**shared, **ends, "num_hidden_layers": 2, "vocab_size": len(WORDS) + 3, "max_position_embeddings": 12}
    vision = {**shared, "num_hidden_layers": 3, "image_size": CLIP_SIDE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)


def clip_folder(folder: Path, tokenizer: bool = True, squash: bool = False):
    """A CLIPModel with tokenizer and preprocessor settings; returns the model that was saved."""
    from transformers import CLIPModel

    model = seeded(lambda: CLIPModel(clip_config()))
    model.save_pretrained(folder)
    size = {"height": CLIP_SIDE, "width": CLIP_SIDE} if squash else {"shortest_edge": CLIP_SIDE}
    settings = {"size": size, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    if not squash:
        settings |= {"do_center_crop": True, "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if tokenizer:
        word_tokenizer().save_pretrained(folder)
    return model


def word_tokenizer():
    """A transformers tokenizer of WORDS between a begin and an end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin, end, unknown = "<|startoftext|>", "<|endoftext|>", "<unk>"
    vocabulary = {word: i for i, word in enumerate([*WORDS, begin, end, unknown])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [(begin, vocabulary[begin]), (end, vocabulary[end])]
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end, unk_token=unknown
    )


def dino_folder(folder: Path, seed: int = 0):
    """A Dinov2Model as its authors' folders are: shorter side resized to more than the centre crop."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=DINO_SIDE,
        patch_size=7,
        layerscale_value=1.0,
    )
    model = seeded(lambda: Dinov2Model(config), seed)
    model.save_pretrained(folder)
    settings = {
        "size": {"shortest_edge": DINO_SIDE + 8},
        "crop_size": {"height": DINO_SIDE, "width": DINO_SIDE},
        "do_center_crop": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": CLIP_SIDE, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def open_clip_file(folder: Path):
    """An open_clip model in a safetensors file, with its architecture beside it; returns (path, model)."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model = seeded(lambda: open_clip.model.CLIP(**OPEN_CLIP))
    path = folder / "open_clip_model.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": settings}))
    return path, model


def core_vision(folder: Path, dino: bool):
    """ComfyUI's own CLIP_VISION object over a random network of its own classes, as its loader leaves it."""
    import comfy.clip_vision

    from ..tiny_models import randomise

    shared = {"num_hidden_layers": 2, "num_attention_heads": 2}
    if dino:  # 518 pixels in patches of 14 are fixed in ComfyUI's class
        config = {**shared, "model_type": "dinov2", "hidden_size": 16, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
        config |= {"image_size": 518, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    else:
        config = {**shared, "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32}
        config |= {"hidden_act": "quick_gelu", "image_size": CLIP_SIDE, "patch_size": 8, "num_channels": 3}
        config |= {"projection_dim": 8}
    path = folder / "core_vision.json"
    path.write_text(json.dumps(config))
    with torch.inference_mode():  # as a loader node leaves it
        vision = comfy.clip_vision.ClipVisionModel(str(path))
        randomise(vision.model, seed=1)
    return vision
