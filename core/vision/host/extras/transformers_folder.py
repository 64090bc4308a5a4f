"""A Hugging Face transformers folder -> Tower. Read from disk only; code in the folder is never run."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....files import read_table
from ...preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from .offline import offline, package, reason, weights_variant
from .settings import check_size, is_side, read_preprocessing
from .tower import Tower, VisionOutput

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
BILINEAR = 2  # PIL's code for bilinear in preprocessor_config.json
WITH_PROJECTION = "CLIPVisionModelWithProjection"  # AutoModel would drop the projection


class TransformersTower(Tower):
    """Any transformers model that takes pixel_values.

    The embedding is the projected one if the model has a projection (CLIP), else pooler_output (DINOv2: the class
    token; SigLIP: attention pooling), else the first token of the last layer.
    """

    def __init__(self, model: Any, tokenizer: Any, pooled: bool, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.pooled = model, tokenizer, pooled
        kind = "image_embeds" if hasattr(model, "visual_projection") else "pooler_output" if pooled else "class token"
        self.description = f"{name} ({type(model).__name__}, {kind})"

    def forward(self, pixel_values: Tensor) -> VisionOutput:
        vision = getattr(self.model, "vision_model", self.model)
        out = vision(pixel_values=pixel_values, output_hidden_states=True)
        last = out.last_hidden_state
        embedding = getattr(out, "pooler_output", None) if self.pooled else None
        embedding = last[:, 0] if embedding is None else embedding.flatten(1)
        if hasattr(self.model, "visual_projection"):
            embedding = self.model.visual_projection(embedding)
        hidden = getattr(out, "hidden_states", None)
        return embedding, last, hidden[-2] if hidden else None

    def encode_text(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
        pooled = self.model.text_model(**inputs).pooler_output
        return self.model.text_projection(pooled) if hasattr(self.model, "text_projection") else pooled


def load_transformers(folder: Path) -> Tower:
    """Load a folder with config.json and model.safetensors of a model that takes images."""
    config = read_config(folder)
    name = WITH_PROJECTION if config.get("architectures") == [WITH_PROJECTION] else "AutoModel"
    model, missing = read_model(folder, name, optional="pooler.")
    if getattr(getattr(model, "vision_model", model), "main_input_name", "") != "pixel_values":
        raise ValueError(
            f"The folder {folder.name} holds a {type(model).__name__}, which takes no images: choose another."
        )
    tokenizer, text_missing = _tokenizer(folder, model)
    tower = TransformersTower(model, tokenizer, not missing, folder.name)
    tower.preprocess, tower.text_missing = _preprocess(folder, model.config), text_missing
    if str(model.config.model_type).startswith("dinov2"):
        tower.trained_side = _side(model.config.image_size)
    return tower


def read_model(
    folder: Path,
    class_name: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    optional: tuple[str, ...] | str = (),
) -> tuple[Any, set[str]]:
    """A folder's model, frozen, loaded by a class of transformers; and the names of weights that its files lack.

    variant: the infix of files named like model.bf16.safetensors. optional: the beginning of names that may be lacking.
    """
    config = read_config(folder)
    if variant is None:
        weights_variant(folder)
    transformers = package("transformers", folder.name, "transformers")
    kind, version = getattr(transformers, class_name), transformers.__version__

    def build() -> Any:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return getattr(kind, "from_config", kind)(settings)

    files, quantised = [*folder.glob("*.safetensors")], "quantization_config" in config
    with offline():
        check_size(f"config.json of {folder.name}", config, files, None if quantised else build)
    setting = "dtype" if int(version.split(".")[0]) >= 5 else "torch_dtype"  # its older name
    options = {"variant": variant, setting: dtype}  # while loading: a captioner in float32 would need twice the memory
    bars = transformers.utils.logging
    with contextlib.ExitStack() as stack:
        if bars.is_progress_bar_enabled():
            bars.disable_progress_bar()
            stack.callback(bars.enable_progress_bar)
        model, info = pretrained(kind, folder, f"transformers {version}", trust_remote_code=False, **options)
    missing = set(info["missing_keys"])
    check_complete(folder, {name for name in missing if not name.startswith(optional)})
    return model.to(dtype).train(False).requires_grad_(False), missing


def pretrained(kind: Any, folder: Path, library: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A network of a class of another library, and what its loading reports. ValueError for a damaged folder."""
    with offline():
        try:
            return kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:  # these libraries raise many types
            raise ValueError(
                f"The folder {folder.parent.name}/{folder.name} could not be loaded by {library} ({reason(error)}): "
                "check that config.json and the weights belong together and are complete."
            ) from error


def read_processor(folder: Path, class_name: str = "AutoProcessor") -> Any:
    """The processor for a folder's model, which prepares images and texts. ValueError when its files are missing."""
    kind = getattr(package("transformers", folder.name, "transformers"), class_name)
    read_preprocessing(folder)  # for its checks
    with offline():
        try:
            return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # as above
            raise ValueError(
                f"The folder {folder.name} lacks what prepares images and words ({reason(error)}): copy the model's "
                "whole folder, with preprocessor_config.json and the tokenizer's files."
            ) from error


def kind_of(folder: Path) -> tuple[str, str]:
    """(model type, class name) from a folder's config.json; empty strings when it cannot be read."""
    try:
        config = read_config(folder)
    except ValueError:
        return "", ""
    classes = config.get("architectures") or [""]
    return str(config.get("model_type", "")), str(classes[0] if isinstance(classes, list) else "")


def check_complete(folder: Path, missing: set[str], unused: Collection[str] = ()) -> None:
    """ValueError when weights are missing, or are there without a place."""
    for names, problem in (
        (missing, "lack {} tensors that its config.json asks for"),
        (unused, "have {} without a use"),
    ):
        if names:
            raise ValueError(
                f"The weights of {folder.name} {problem.format(len(names))} (first: {min(names)}): copy config.json "
                "and model.safetensors of the same model."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. ValueError when it cannot be read."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"The folder {folder.name} has no config.json: copy the model's whole folder.")
    return read_table(folder / "config.json")


def _tokenizer(folder: Path, model: Any) -> tuple[Any, str | None]:
    if not hasattr(model, "text_model"):
        return None, "it is a vision model only"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None, "its folder has no tokenizer files"
    try:
        return read_processor(folder, "AutoTokenizer"), None
    except ValueError as error:
        return None, f"its tokenizer could not be loaded ({reason(error.__cause__ or error)})"


def _preprocess(folder: Path, config: Any) -> Preprocess:
    """The Preprocess of the folder's settings; without them, the config's image size and the family's mean and std."""
    vision_config = getattr(config, "vision_config", config)
    size = _side(getattr(vision_config, "image_size", None)) or 224
    clip_like = str(config.model_type).startswith(("clip", "siglip"))
    mean, std = (CLIP_MEAN, CLIP_STD) if clip_like else (IMAGENET_MEAN, IMAGENET_STD)
    settings = read_preprocessing(folder)
    if settings is None:
        return Preprocess(size, size, mean, std)
    settings = {name: value for name, value in settings.items() if value is not None or name[:3] == "do_"}
    resize = settings.get("size", size)
    crop = _side(settings.get("crop_size")) if settings.get("do_center_crop", "crop_size" in settings) else None
    # A plain number is the shorter side for models that crop afterwards (CLIP, DINOv2), both sides for others (DINO).
    squash = crop is None and (not isinstance(resize, dict) or "height" in resize)
    shorter = _side(resize) or size
    if settings.get("do_normalize", True):
        mean, std = tuple(settings.get("image_mean", mean)), tuple(settings.get("image_std", std))
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mode = "bilinear" if settings.get("resample") == BILINEAR else "bicubic"
    return Preprocess(crop or shorter, None if squash else shorter, mean, std, mode)


def _side(size: Any) -> int | None:
    """One side of a size written as 224, [224, 224], {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    if isinstance(size, (list, tuple)):
        size = size[0]
    return int(size) if is_side(size) else None
