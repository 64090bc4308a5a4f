"""The published file of the instance-retrieval model -> Tower (see core/vision/instance_retrieval.py)."""

from torch import Tensor

from ...instance_retrieval import PREPROCESS, RetrievalNetwork
from .tower import Tower, VisionOutput

MAX_BYTES = 8 << 30
SOURCE = "https://www.kaggle.com/datasets/louieshao/guieweights0732"


def retrieval_missing(name: object) -> str:
    """The error message for a missing file of this name."""
    return (
        f"There is no {str(name)[:80]!r} in models/ir_features. The weights of the instance-retrieval model are on "
        f"Kaggle ({SOURCE}, about 2.5 GB, with a Kaggle account): read their licence there, since some of the data "
        "that they were trained on is for research only, put the .pth file into models/ir_features, and press R. "
        "Without them, disconnect this part: DINOv2 alone works nearly as well."
    )


class RetrievalTower(Tower):
    """The instance-retrieval model; its 64 features are the embedding."""

    def __init__(self, model: RetrievalNetwork, name: str) -> None:
        super().__init__()
        self.model, self.preprocess = model, PREPROCESS
        self.description = f"{name} (instance retrieval, {model.fc1.out_features} numbers)"

    def forward(self, pixel_values: Tensor) -> VisionOutput:
        return self.model(pixel_values), None, None
