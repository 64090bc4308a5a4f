"""A segment-anything file (Kirillov et al. 2023, arXiv 2304.02643) -> masks of the objects in boxes.

The network comes from the authors' package, the weights from models/sams. The weights determine which of the three
sizes a file contains.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....files import read_weights
from .offline import offline, package, reason

WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
MAX_BYTES = 8 << 30
VARIANT_KEY = "image_encoder.pos_embed"
INPUT_PIXELS, BYTES_PER_PIXEL = 1024.0**2, 4000.0  # of the image encoder, for ComfyUI's memory management


class Segmenter(nn.Module):
    """The authors' network with its predictor."""

    def __init__(self, sam: Any, predictor: type, description: str) -> None:
        super().__init__()
        self.sam, self._predictor, self.description = sam, predictor, description

    def forward(self, image: np.ndarray, boxes: Tensor) -> Tensor:
        """One mask [N, H, W] (bool, on the CPU) for each box [N, 4] in an image, uint8 [H, W, 3]."""
        predictor = self._predictor(self.sam)
        with offline():
            predictor.set_image(image)
            scaled = predictor.transform.apply_boxes_torch(boxes.to(predictor.device), image.shape[:2])
            masks, _, _ = predictor.predict_torch(None, None, scaled, multimask_output=False)
        return masks[:, 0].cpu()


def load_sam(path: Path) -> Segmenter:
    """Load sam_vit_b_*.pth, sam_vit_l_*.pth or sam_vit_h_*.pth, or the same weights as safetensors; frozen, float32."""
    otherwise = " (or connect a MASK from another node)"
    segment_anything = package("segment_anything", path.name, "segment-anything", otherwise)
    tensors = read_weights(path, MAX_BYTES)
    embedding = tensors.get(VARIANT_KEY)
    variant = WIDTHS.get(embedding.shape[-1]) if isinstance(embedding, Tensor) and embedding.ndim == 4 else None
    if variant is None:
        raise ValueError(
            f"{path.name} does not hold a segment-anything model ({VARIANT_KEY} of width 768, 1024 or 1280 is "
            "expected): choose one of the authors' files, such as sam_vit_b_01ec64.pth."
        )
    with offline(), torch.device("meta"):  # only names and shapes, until it gets the file's tensors
        sam = segment_anything.sam_model_registry[variant]()
        try:
            sam.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{path.name} does not fit segment-anything's {variant} ({reason(error)}): SAM 2, HQ-SAM and MobileSAM "
                "are other networks; choose one of the authors' files, such as sam_vit_b_01ec64.pth."
            ) from error
    for name in ("pixel_mean", "pixel_std"):  # in no file
        numbers = inspect.signature(type(sam)).parameters[name].default
        setattr(sam, name, torch.tensor(numbers).view(-1, 1, 1))
    sam = sam.float().train(False).requires_grad_(False)
    return Segmenter(sam, segment_anything.SamPredictor, f"{path.name} ({variant})")
