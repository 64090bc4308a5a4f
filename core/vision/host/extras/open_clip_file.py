"""A safetensors file of an open_clip model -> Tower. The library is optional; nothing is downloaded."""

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ....files import read_table, read_weights
from ...preprocess import CLIP_MEAN, CLIP_STD, MAX_SIDE, Preprocess
from .offline import offline, package, reason
from .settings import check_size, is_color, is_side
from .tower import Tower, VisionOutput

MAX_BYTES = 32 << 30
CONFIG = "open_clip_config.json"
TABLES = ("vision_cfg", "text_cfg")  # of its model_cfg
NAMING = (
    "name it <model>__<anything>.safetensors (ViT-B-32__mine.safetensors), put its open_clip_config.json beside it, "
    "or, for a model of transformers, copy its whole folder (config.json, model.safetensors)"
)


class OpenClipTower(Tower):
    """An open_clip model; the embedding is the projected output of its encode_image, not normalised."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.description = f"{name} (open_clip, image_embeds)"

    def forward(self, pixel_values: Tensor) -> VisionOutput:
        transformer = getattr(self.model.visual, "transformer", None)
        blocks = list(getattr(transformer, "resblocks", []))[-2:]
        hidden: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.callback(block.register_forward_hook(lambda _module, _in, out: hidden.append(out)).remove)
            embedding = self.model.encode_image(pixel_values)
        if blocks and not getattr(transformer, "batch_first", True):
            hidden = [tokens.transpose(0, 1) for tokens in hidden]
        return embedding, hidden[-1] if hidden else None, hidden[0] if len(hidden) == 2 else None

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))


def load_open_clip(path: Path) -> Tower:
    """Load a file named <model>__<tag>.safetensors, or a file or folder with its open_clip_config.json."""
    open_clip = package("open_clip", path.name, "open_clip_torch", " (or use a transformers folder)")
    files = [path] if path.is_file() else sorted(path.glob("open_clip*.safetensors"))
    if not files:
        raise ValueError(f"The folder {path.name} has no open_clip*.safetensors (pickles are refused): put it there.")
    name, model_config, image_config = _configuration(files[0], open_clip)
    text = model_config.get("text_cfg", {})
    with offline():
        model = _build(files[0], open_clip, model_config).train(False).requires_grad_(False)
        tower = OpenClipTower(model, open_clip.SimpleTokenizer(context_length=text.get("context_length", 77)), name)
    tokenizer = text.get("hf_tokenizer_name")
    tower.text_missing = tokenizer and (
        f"its tokenizer ({tokenizer}) does not come with open_clip; a transformers folder of it has one"
    )
    tower.preprocess = _preprocess(model, image_config)
    return tower


def _configuration(weights: Path, open_clip: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(display name, architecture, image settings) from the sidecar file or, without one, from the file name."""
    sidecar = weights.with_name(CONFIG)
    if sidecar.is_file():
        config = read_table(sidecar)
        model: Any = config.get("model_cfg")
        image: Any = config.get("preprocess_cfg", {})
        tables = [model, image, *(model.get(part) for part in TABLES)] if isinstance(model, dict) else [model]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError(
                f"{CONFIG} beside {weights.name} has no tables {', '.join(('model_cfg', *TABLES))}: copy it again."
            )
        return weights.stem, model, image
    name, _, tag = weights.stem.partition("__")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip knows no model '{name}', so it is unknown what {weights.name} holds: {NAMING}.")
    pretrained = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if pretrained.get("quick_gelu"):
        config["quick_gelu"] = True
    return f"{name} {tag}".strip(), config, pretrained


def _build(weights: Path, open_clip: Any, config: dict[str, Any]) -> Any:
    file, config = weights.name, dict(config)
    custom_text = config.pop("custom_text", False)
    hub_text = "hf_model_name" in config.get("text_cfg", {})
    if hub_text or "multimodal_cfg" in config:
        raise ValueError(
            f"{file} has a text encoder that open_clip fetches from the network: use a transformers folder of it."
        )
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    check_size(f"The architecture of {file}", config, [weights], lambda: kind(**config))
    try:
        model = kind(**config)
    except Exception as error:  # the settings come from the user's file
        raise ValueError(f"open_clip cannot build {file} ({reason(error)}): check its {CONFIG}.") from error
    tensors = read_weights(weights, MAX_BYTES)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model of its name ({reason(error)}): {NAMING}.") from error
    return model


def _preprocess(model: Any, settings: dict[str, Any]) -> Preprocess:
    size = model.visual.image_size
    size = size[0] if isinstance(size, (list, tuple)) else size
    mean, std = settings.get("mean") or CLIP_MEAN, settings.get("std") or CLIP_STD
    if not (is_side(size) and is_color(mean) and is_color(std, positive=True)):
        raise ValueError(
            f"{CONFIG} of a model for {ascii(size)[:60]} pixels has mean {ascii(mean)[:60]} and std {ascii(std)[:60]}, "
            f"expected up to {MAX_SIDE} pixels and three numbers each, of std above 0: copy it again."
        )
    squash = settings.get("resize_mode", "shortest") == "squash"
    mode = "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
    return Preprocess(int(size), None if squash else int(size), tuple(mean), tuple(std), mode)
