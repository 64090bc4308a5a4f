"""Load vision models as CLIP_VISION, and compute differentiable features with any CLIP_VISION.

ComfyUI's own encode_image rounds pixels to 8 bits, so its gradient is zero everywhere; features() runs the same network
with the pack's preprocessing.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor

from ...files import read_weights
from ...session import folders
from ...session.inputs import Names
from ...session.weights import load_fully
from ..instance_retrieval import from_published
from ..preprocess import Preprocess
from .extras.caption import is_captioner
from .extras.grounding import is_detector
from .extras.offline import running
from .extras.open_clip_file import load_open_clip
from .extras.retrieval import MAX_BYTES, RetrievalTower
from .extras.tower import Tower, VisionOutput
from .extras.transformers_folder import WEIGHTS, load_transformers

BYTES_PER_PIXEL = 600.0  # upper estimate of one forward pass's activations, for ComfyUI's memory management
OUTPUTS = ("image_embeds", "last_hidden_state", "penultimate_hidden_states", "mm_projected")
BATCH = 8  # images per forward pass without gradients


class VisionModel:
    """A CLIP_VISION whose network comes from transformers or open_clip; float32 weights in a ModelPatcher.

    encode_image(), load_device, patcher and image_size are compatible with ComfyUI's own object.
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
        """[B, H, W, C] in 0..1 -> Output with OUTPUTS."""
        _load(self, image.shape[0])
        with torch.no_grad():
            outputs = self.run(image, crop, self.preprocess)
        output, device = comfy.clip_vision.Output(), mm.intermediate_device()
        for name, value in zip(OUTPUTS, (*outputs, None), strict=True):
            output[name] = None if value is None else value.to(device)
        return output

    def run(self, pixels: Tensor, crop: bool, preprocess: Preprocess) -> VisionOutput:
        """See features(); call inside of a session that has loaded the model, or use embed() without gradients."""
        with running(describe(self)):
            return self.model(preprocess(pixels.to(self.load_device), crop))

    def encode_text(self, texts: list[str]) -> Tensor:
        """Text embeddings [len(texts), D]. ValueError when the model has no text encoder."""
        if self.model.text_missing:
            raise ValueError(f"{describe(self)} cannot read a text: {self.model.text_missing}.")
        _load(self, len(texts))
        with torch.no_grad(), running(describe(self)):
            return self.model.encode_text(texts).float().to(mm.intermediate_device())

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, with the interface of ComfyUI's own object."""
        return self.model.state_dict()


def vision_names(matches: Callable[[Path], bool] = lambda path: not (is_detector(path) or is_captioner(path))) -> Names:
    """The entries of models/likeness_vision that match; by default those without a node of their own."""
    return folders.matching(folders.VISION, matches)


def load_vision(path: Path) -> VisionModel:
    """A transformers folder, an open_clip folder, or an open_clip safetensors file. ValueError for anything else."""
    if path.is_file() and path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name} is not a safetensors file: pickled weights can run code and are refused.")
    complete = (path / "config.json").is_file() and any((path / name).is_file() for name in WEIGHTS)
    of_open_clip = path.is_file() or (not complete and (path / "open_clip_config.json").is_file())
    return VisionModel(load_open_clip(path) if of_open_clip else load_transformers(path))


def load_retrieval_model(path: Path) -> VisionModel:
    """SISO's second vision model, from its published .pth or its tensors as safetensors. ValueError for others."""
    return VisionModel(RetrievalTower(from_published(read_weights(path, MAX_BYTES)), path.stem))


def features(vision: Any, pixels: Tensor, crop: bool = True, preprocess: Preprocess | None = None) -> Tensor:
    """Embeddings [B, D] of images [B, H, W, 3], with ComfyUI's CLIP_VISION objects or ours, on the model's device.

    crop=False squashes instead of cropping the centre, for subject crops, which are square and have no border.
    Differentiable inside of a session that has loaded the model. CLIP: the projected image embedding. DINOv2: the class
    token after the last layer norm. ComfyUI's SigLIP, which has no pooling layer: the mean of its tokens. preprocess:
    replaces the model's own.
    """
    preprocess = preprocess or preprocess_of(vision)
    if isinstance(vision, VisionModel):
        return vision.run(pixels, crop, preprocess)[0]
    inputs = preprocess(pixels.to(vision.load_device), crop)
    pooled = vision.model(pixel_values=inputs, intermediate_output=-2)[2]
    return pooled.mean(1) if pooled.ndim == 3 else pooled


def embed(vision: Any, pixels: Tensor, crop: bool = True) -> Tensor:
    """features() without gradients, in batches -> [B, D] on the CPU."""
    _load(vision, min(BATCH, pixels.shape[0]))
    embeddings = []
    with torch.no_grad():
        for batch in pixels.split(BATCH):
            mm.throw_exception_if_processing_interrupted()
            embeddings.append(features(vision, batch, crop).float().cpu())
    return torch.cat(embeddings)


def preprocess_of(vision: Any) -> Preprocess:
    if isinstance(vision, VisionModel):
        return vision.preprocess
    return Preprocess(vision.image_size, vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))


def published_preprocess(vision: Any) -> Preprocess:
    """The preprocessing in SISO's scripts: for DINOv2 at its training resolution (518 px), with the full shorter side.

    DINOv2's folders specify a crop of 224 from 256 px, which shows less of the image at a lower resolution.
    """
    published = replace(preprocess_of(vision), published=True)
    side = getattr(vision.model, "trained_side", None)
    return published if side is None else replace(published, size=side, shorter_side=side)


def text_missing(vision: Any) -> str | None:
    """Why the model cannot read a prompt, as the end of a sentence; None when it can."""
    if isinstance(vision, VisionModel):
        return vision.model.text_missing
    return "ComfyUI's CLIP_VISION holds no text encoder; Load Vision Model loads one that does"


def describe(vision: Any) -> str:
    """A short description of the model. ComfyUI's own object does not record its file, so its size is named."""
    if isinstance(vision, VisionModel):
        return f"{vision.model.description}, {vision.image_size} px"
    width = next(iter(vision.model.state_dict().values())).shape[-1]
    kind = "DINOv2" if "Dino" in type(vision.model).__name__ else "CLIP vision"
    return f"{kind} from CLIP_VISION ({type(vision.model).__name__}, width {width}, {vision.image_size} px)"


def _load(vision: Any, images: int) -> None:
    load_fully([vision.patcher], BYTES_PER_PIXEL * images * vision.image_size**2)
