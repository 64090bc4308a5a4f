"""The numbers of the authors' UNet with EZIGen's adapter, for both networks that are held against them."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open

from likeness.core.ezigen.adapter import SubjectTokens, batch_tokens

from .unets import DATA

TIMESTEP = 381  # of the file's forwards


class Official:
    """The file: inputs i, outputs o, gradients g, weights w, and the settings it was made with."""

    def __init__(self) -> None:
        with safe_open(str(DATA / "ezigen.safetensors"), framework="pt") as file:
            self.tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            self.settings = json.loads(file.metadata()["cfg"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def features(official: Official) -> SubjectTokens:
    captured = [official[f"o.ref.feat.{index:02d}"] for index in range(16)]
    return batch_tokens(captured, [len(captured[0])])


CASES = {
    "subject": features,
    "adapter_no_subject": lambda official: features(official).map(lambda tokens: tokens[:, :0]),
    "zero_subject": lambda official: features(official).map(torch.zeros_like),
    "rect": features,
}


def captures_as_published(network, official: Official) -> None:
    """What the reference UNet is asked for: the inputs of its self-attentions, in the order of w."""
    with torch.inference_mode():
        found = network.capture(official["i.ref.x"][:1], torch.tensor([1]), official["i.ref.ctx"][:1])
    for index, each in enumerate(found):
        assert relative(each, official[f"o.ref.feat.{index:02d}"]) < 2e-5


def predicts_as_published(network, official: Official, case: str) -> None:
    """The noise, with and without a subject."""
    x = official["i.x_rect" if case == "rect" else "i.x"]
    with torch.inference_mode():
        found = network.predicted_noise(x, torch.full((2,), TIMESTEP), official["i.ctx"], CASES[case](official))
    assert relative(found, official[f"o.main.{case}"]) < 2e-5


def learns_as_published(network, official: Official) -> None:
    """The loss, and the adapter's gradients."""
    x, context = (official[name].clone() for name in ("i.x", "i.ctx"))
    found = network.predicted_noise(x, torch.full((2,), TIMESTEP), context, features(official))
    loss = (found - official["i.target"]).square().mean()
    assert relative(loss[None], official["o.train.loss"]) < 1e-5
    parameters, expected = network.adapter.published_parameters(), official.part("g.")
    assert len(expected) == 22
    loss.backward()
    for name, gradient in expected.items():
        assert relative(parameters[name].grad, gradient) < 1e-4, name
    for parameter in parameters.values():
        parameter.grad = None
