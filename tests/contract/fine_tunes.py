"""What the tests of the fine-tune nodes share."""

from __future__ import annotations

import torch

from .methods import Setting, run_node, sample, sine_inputs


def train(setting: Setting, **changes) -> tuple:
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = sine_inputs(setting, **{"steps": 2, **changes})
    if inputs.get("clip") is not None:
        del inputs["positive"]
    return run_node(LikenessFineTune, **inputs)


def encode(clip, text: str) -> list:
    from nodes import CLIPTextEncode

    return run_node(CLIPTextEncode, clip=clip, text=text)[0]


def picture(setting: Setting, model, positive=None) -> torch.Tensor:
    return sample(model, positive or setting.target, setting.empty, setting.latent)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict, b: dict) -> float:
    """The largest relative distance of two tensors of one name: what another order of sums leaves in some updates."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).float().norm() / a[name].float().norm().clamp_min(1e-6)) for name in a)
