"""Lets PyPI's torchvision be imported beside a CPU-only torch; environment.py copies it into the sandbox.

That torchvision is built for CUDA. Its binary cannot be loaded here, so two operators that its Python code describes
are never declared and the import fails. They are declared (not implemented) just before torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder

DECLARED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(MetaPathFinder):
    library = None  # keeping the library alive keeps its declarations

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision" and self.library is None:
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in DECLARED:
                    self.library.define(operator)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
