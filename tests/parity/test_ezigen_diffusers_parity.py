"""The command-line trainer's network, a diffusers UNet, against the numbers of the authors' UNet."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from likeness.core.ezigen import Adapter, SubjectTokens, joined
from likeness.toolbox.adapter_trainer.network import DiffusersUNet, layers, new_adapter

from .unets import DATA

TIMESTEP = torch.full((2,), 381)


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    with safe_open(str(DATA / "ezigen.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module", params=["plain", "checkpointing"])
def network(request, official) -> DiffusersUNet:
    from diffusers import UNet2DConditionModel

    with safe_open(str(DATA / "ezigen.safetensors"), framework="pt") as file:
        settings = json.loads(file.metadata()["cfg"])
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            block_out_channels=settings["CH"],
            attention_head_dim=[width // settings["HD"] for width in settings["CH"]],
            cross_attention_dim=settings["CTX"],
            use_linear_projection=True,
        )
    weights = {name[2:]: value for name, value in official.items() if name.startswith("w.")}
    own = unet.state_dict().keys()
    unet.load_state_dict({name: weights[name] for name in own})
    unet.requires_grad_(False)
    if request.param == "checkpointing":
        unet.enable_gradient_checkpointing()
    adapter = new_adapter(unet)
    adapter.load({name: value for name, value in weights.items() if name not in own})
    assert [layer.name.removesuffix(".transformer_blocks.0") for layer in adapter.described] == settings["layers"]
    return DiffusersUNet(unet, adapter, torch.linspace(0.9, 0.1, 1000))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def features(official) -> SubjectTokens:
    return joined([official[f"o.ref.feat.{index:02d}"] for index in range(16)])


def test_the_published_size():
    """In SD2.1-base the adapter has the published number of tensors and of numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        heads = [5, 10, 20, 20]
        unet = UNet2DConditionModel(attention_head_dim=heads, cross_attention_dim=1024, use_linear_projection=True)
        adapter = Adapter(layers(unet))
    assert [layer.heads for layer in adapter.described] == [5, 5, 10, 10, *[20] * 6, 10, 10, 10, 5, 5, 5]
    assert len(adapter.named()) == 113
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 49_599_056


def test_captured_features(official, network):
    with torch.no_grad():
        found = network.capture(official["i.ref.x"][:1], torch.tensor([1]), official["i.ref.ctx"][:1])
    for index, each in enumerate(found):
        assert relative(each, official[f"o.ref.feat.{index:02d}"]) < 2e-5


CASES = {
    "subject": features,
    "adapter_no_subject": lambda official: None,
    "zero_subject": lambda official: features(official).map(torch.zeros_like),
    "rect": features,
}


@pytest.mark.parametrize("case", CASES)
def test_forward(official, network, case):
    x = official["i.x_rect" if case == "rect" else "i.x"]
    with torch.no_grad():
        found = network.predicted_noise(x, TIMESTEP, official["i.ctx"], CASES[case](official))
    assert relative(found, official[f"o.main.{case}"]) < 2e-5


def test_the_frozen_network_alone(official, network):
    with torch.no_grad():
        found = network.unet(official["i.x"], TIMESTEP, official["i.ctx"]).sample
    assert relative(found, official["o.main.adapter_off"]) < 2e-5


def test_loss_and_gradients(official, network):
    found = network.predicted_noise(official["i.x"], TIMESTEP, official["i.ctx"], features(official))
    loss = (found - official["i.target"]).square().mean()
    assert relative(loss[None], official["o.train.loss"]) < 1e-5
    parameters = network.adapter.named()
    names = [name[2:] for name in official if name.startswith("g.")]
    assert len(names) == 22
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward()
    for name in names:
        assert relative(parameters[name].grad, official[f"g.{name}"]) < 1e-4, name
