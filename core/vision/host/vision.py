"""Vision models: loading them for a CLIP_VISION output, and features of any CLIP_VISION with a gradient.

ComfyUI's own encode_image rounds pixels to 8 bits, so its gradient is zero everywhere; features() is the same network
behind our own preprocessing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

from ...session import folders
from ...session.inputs import Names
from ...session.weights import gradients, load_fully, out_of_place, thawed
from ..preprocess import Preprocess
from .extras.caption import is_captioner
from .extras.grounding import is_detector
from .extras.open_clip_file import load_open_clip
from .extras.retrieval import load_retrieval
from .extras.tower import Tower
from .extras.transformers_folder import WEIGHTS, load_transformers

BYTES_PER_PIXEL = 600.0  # activations of one forward pass, generously, for ComfyUI's memory management
BATCH = 8  # images per forward pass when only measuring


class VisionModel:
    """A CLIP_VISION whose network comes from transformers or open_clip. Weights are float32, in a ModelPatcher.

    Other nodes use encode_image(), load_device, patcher and image_size as with ComfyUI's own object.
    """

    def __init__(self, tower: Tower) -> None:
        self.model = tower
        self.load_device = mm.get_torch_device()
        self.dtype = torch.float32
        self.patcher = comfy.model_patcher.ModelPatcher(
            tower, load_device=self.load_device, offload_device=mm.text_encoder_offload_device()
        )
        self.preprocess = tower.preprocess
        self.image_size = tower.preprocess.size
        self.image_mean, self.image_std = list(tower.preprocess.mean), list(tower.preprocess.std)

    def encode_image(self, image: Tensor, crop: bool = True) -> comfy.clip_vision.Output:
        """[B, H, W, C] in 0..1 -> Output with image_embeds, last_hidden_state, penultimate_hidden_states."""
        _load(self, image.shape[0])
        with torch.no_grad():
            seen = self.model(self.preprocess(image.to(self.load_device), crop))
        output, device = comfy.clip_vision.Output(), mm.intermediate_device()
        output["image_embeds"] = seen.embedding.to(device)
        output["last_hidden_state"] = None if seen.last is None else seen.last.to(device)
        output["penultimate_hidden_states"] = None if seen.penultimate is None else seen.penultimate.to(device)
        output["mm_projected"] = None
        return output

    def features(self, pixels: Tensor, crop: bool = True, preprocess: Preprocess | None = None) -> Tensor:
        """See features(); call inside looking() or measure with embed()."""
        return self.model((preprocess or self.preprocess)(pixels.to(self.load_device), crop)).embedding

    def encode_text(self, texts: list[str]) -> Tensor:
        """Text embeddings [len(texts), D]. ValueError when the model has no text encoder."""
        if self.model.text_missing:
            raise ValueError(f"{self.describe()} cannot read a text: {self.model.text_missing}.")
        _load(self, len(texts))
        with torch.no_grad():
            return self.model.encode_text(texts).float().to(mm.intermediate_device())

    def describe(self) -> str:
        """Name, class, which output is the embedding, and the square it looks at."""
        return f"{self.model.description}, {self.image_size} px"

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, as ComfyUI's own object offers them."""
        return self.model.state_dict()


def vision_names() -> Names:
    """Entries of models/likeness_vision without those that other nodes load: detectors and captioning models."""

    def others(name: str) -> bool:
        path = folders.resolve(folders.VISION, name)
        return is_detector(path) or is_captioner(path)

    return Names(name for name in folders.names(folders.VISION) if not others(name))


def load_vision(path: Path) -> VisionModel:
    """A transformers folder, an open_clip folder, or an open_clip safetensors file. ValueError for anything else."""
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{path.name} is not a safetensors file: pickled weights can run code and are refused.")
        return VisionModel(load_open_clip(path))
    complete = (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHTS)
    if not complete and (path / "open_clip_config.json").is_file():
        return VisionModel(load_open_clip(path))
    return VisionModel(load_transformers(path))


def load_instance_retrieval(path: Path) -> VisionModel:
    """SISO's second feature, from its published file. ValueError for anything else."""
    return VisionModel(load_retrieval(path))


@contextlib.contextmanager
def looking(vision: Any) -> Iterator[None]:
    """Load a CLIP_VISION whole and make it differentiable; features() may be called inside."""
    with gradients():
        _load(vision, 1)
        with thawed([vision.model]), out_of_place(vision.model):
            yield


def features(vision: Any, pixels: Tensor, crop: bool = True, preprocess: Preprocess | None = None) -> Tensor:
    """Embeddings [B, D] of images [B, H, W, 3], of ComfyUI's CLIP_VISION objects and ours, on the model's device.

    crop False squashes instead of cutting out the centre: for subject crops, which are square and have no border.
    Differentiable inside looking(). CLIP: the projected image embedding. DINOv2: the class token after the last layer
    norm. ComfyUI's SigLIP has no pooling layer: the mean of its tokens. preprocess: instead of the model's own.
    """
    if isinstance(vision, VisionModel):
        return vision.features(pixels, crop, preprocess)
    inputs = (preprocess or preprocess_of(vision))(pixels.to(vision.load_device), crop)
    pooled = vision.model(pixel_values=inputs, intermediate_output=-2)[2]
    return pooled.mean(1) if pooled.ndim == 3 else pooled


def embed(vision: Any, pixels: Tensor, crop: bool = True) -> Tensor:
    """features() without a gradient, a few images at a time -> [B, D] on the CPU."""
    _load(vision, min(BATCH, pixels.shape[0]))
    found = []
    with torch.no_grad():
        for part in pixels.split(BATCH):
            mm.throw_exception_if_processing_interrupted()
            found.append(features(vision, part, crop).float().cpu())
    return torch.cat(found)


def preprocess_of(vision: Any) -> Preprocess:
    """What the model wants its images to be."""
    if isinstance(vision, VisionModel):
        return vision.preprocess
    return Preprocess(vision.image_size, vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))


def published_preprocess(vision: Any) -> Preprocess:
    """As SISO's scripts prepare images: DINOv2's whole, at the side that it was trained on (518 px).

    The folders of DINOv2 say 224 of 256 px, which shows less and more coarsely.
    """
    wanted = replace(preprocess_of(vision), published=True)
    side = getattr(vision.model, "trained_side", None)
    return wanted if side is None else replace(wanted, size=side, shorter_side=side)


def text_missing(vision: Any) -> str | None:
    """Why the model cannot read a prompt, as the end of a sentence; None when it can."""
    if isinstance(vision, VisionModel):
        return vision.model.text_missing
    return "ComfyUI's CLIP_VISION holds no text encoder; Load Vision Model loads one that does"


def describe(vision: Any) -> str:
    """The model in a few words. ComfyUI's own object does not know its file, so its shape is named."""
    if isinstance(vision, VisionModel):
        return vision.describe()
    sizes = next(iter(vision.model.state_dict().values())).shape[-1]
    kind = "DINOv2" if "Dino" in type(vision.model).__name__ else "CLIP vision"
    return f"{kind} from CLIP_VISION ({type(vision.model).__name__}, width {sizes}, {vision.image_size} px)"


def _load(vision: Any, images: int) -> None:
    load_fully([vision.patcher], BYTES_PER_PIXEL * images * vision.image_size**2)
