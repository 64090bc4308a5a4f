"""Networks that say little, as trained ones do from step to step: images can be inverted with them."""

from __future__ import annotations

import torch

from .. import tiny_models
from .setting import Setting


def calm(setting: Setting, says: float = 0.05) -> Setting:
    """A network that says little, as a trained one does from step to step: a random one cannot be walked back."""
    with torch.inference_mode():
        network = setting.model.model.diffusion_model
        last = network.out[2] if hasattr(network, "out") else network.final_layer.linear
        last.weight.mul_(says)
    return setting


def calmed(family: str = "sd1") -> Setting:
    """The family's calm network, one for all tests that leave its weights alone."""
    found = Setting(family, shared=True)
    found.model = tiny_models.shared(("calm", family), lambda: calm(Setting(family)).model)
    return found
