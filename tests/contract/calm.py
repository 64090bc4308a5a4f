"""Networks that say little, as trained ones do from step to step: images can be inverted with them."""

from __future__ import annotations

import copy
import functools

import torch

from .setting import Setting


def calm(setting: Setting, says: float = 0.05) -> Setting:
    """A network that says little, as a trained one does from step to step: a random one cannot be walked back."""
    with torch.inference_mode():
        network = setting.model.model.diffusion_model
        last = network.out[2] if hasattr(network, "out") else network.final_layer.linear
        last.weight.mul_(says)
    return setting


@functools.cache
def _calmed(family: str) -> Setting:
    return calm(Setting(family))


def calmed(family: str = "sd1") -> Setting:
    """The family's calm network, one for all tests that leave its weights and prompts alone, in a MODEL of its own."""
    found = copy.copy(_calmed(family))
    found.model = found.model.clone()
    return found
