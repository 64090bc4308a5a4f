"""Makes PyPI's torchvision importable with a CPU-only torch; environment.py copies this file into the sandbox.

That torchvision is built for CUDA. Its binary cannot be loaded, so two operators that its Python code registers are
never declared and the import fails. This declares them, without implementations, just before torchvision is imported.
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
