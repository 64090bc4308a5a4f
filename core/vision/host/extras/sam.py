"""A segment-anything file (Kirillov et al. 2023, arXiv 2304.02643) -> masks of the objects in boxes.

The network comes from the authors' package, the weights from models/sams. The weights determine which of the three
sizes a file contains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....files import read_weights
from .install import missing_package
from .offline import offline, reason

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


@dataclass(frozen=True)
class SamWeights:
    """The validated content of a segment-anything file; load_sam() builds the network from it."""

    name: str
    variant: str
    tensors: dict[str, Tensor]


def read_sam(path: Path) -> SamWeights:
    """Read sam_vit_b_*.pth, sam_vit_l_*.pth or sam_vit_h_*.pth, or the same weights as safetensors.

    Raises ValueError when the file holds something else; RuntimeError when the package is not installed.
    """
    try:
        import segment_anything
    except ImportError as error:
        otherwise = " (or connect a MASK from another node)"
        raise missing_package(path.name, "segment-anything", error, "segment-anything", otherwise) from error
    tensors = read_weights(path, MAX_BYTES)
    embedding = tensors.get(VARIANT_KEY)
    variant = WIDTHS.get(embedding.shape[-1]) if isinstance(embedding, Tensor) and embedding.ndim == 4 else None
    if variant is None:
        raise ValueError(
            f"{path.name} does not hold a segment-anything model ({VARIANT_KEY} of width 768, 1024 or 1280 is "
            "expected): choose one of the authors' files, such as sam_vit_b_01ec64.pth."
        )
    with offline(), torch.device("meta"):  # only names and shapes
        empty = segment_anything.sam_model_registry[variant]()
        try:
            empty.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"{path.name} does not fit segment-anything's {variant} ({reason(error)}): SAM 2, HQ-SAM and MobileSAM "
                "are other networks; choose one of the authors' files, such as sam_vit_b_01ec64.pth."
            ) from error
    return SamWeights(path.name, variant, tensors)


def load_sam(weights: SamWeights) -> Segmenter:
    """The network with these weights, frozen, in float32."""
    import segment_anything

    with offline():
        sam = segment_anything.sam_model_registry[weights.variant]()
        sam.load_state_dict(weights.tensors, strict=True)
        sam = sam.float().train(False).requires_grad_(False)
        return Segmenter(sam, segment_anything.SamPredictor, f"{weights.name} ({weights.variant})")
