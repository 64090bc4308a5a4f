"""The published file of the instance-retrieval model -> Tower (see core/vision/instance_retrieval.py)."""

from torch import Tensor

from ...instance_retrieval import PREPROCESS, RetrievalNetwork
from .tower import Tower, VisionOutput

MAX_BYTES = 8 << 30


class RetrievalTower(Tower):
    """The instance-retrieval model; its 64 features are the embedding."""

    def __init__(self, model: RetrievalNetwork, name: str) -> None:
        super().__init__()
        self.model, self.preprocess = model, PREPROCESS
        self.description = f"{name} (instance retrieval, {model.fc1.out_features} numbers)"

    def forward(self, pixel_values: Tensor) -> VisionOutput:
        return self.model(pixel_values), None, None
