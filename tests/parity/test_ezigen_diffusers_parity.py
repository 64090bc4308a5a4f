"""The command-line trainer's network, a diffusers UNet, against the numbers of the authors' UNet."""

from __future__ import annotations

import pytest
import torch

from likeness.core.ezigen.adapter import Adapter
from likeness.toolbox.adapter_trainer.network import DiffusersUNet, diffusers_adapter, layers

from .ezigen_numbers import (
    CASES,
    TIMESTEP,
    Official,
    captures_as_published,
    learns_as_published,
    predicts_as_published,
    relative,
)


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


@pytest.fixture(scope="module", params=["plain", "checkpointing"])
def network(request, official) -> DiffusersUNet:
    from diffusers import UNet2DConditionModel

    settings = official.settings
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            block_out_channels=settings["CH"],
            attention_head_dim=[width // settings["HD"] for width in settings["CH"]],
            cross_attention_dim=settings["CTX"],
            use_linear_projection=True,
        )
    weights = official.part("w.")
    own = unet.state_dict().keys()
    unet.load_state_dict({name: weights[name] for name in own})
    unet.requires_grad_(False)
    if request.param == "checkpointing":
        unet.enable_gradient_checkpointing()
    adapter = diffusers_adapter(unet)
    adapter.load({name: value for name, value in weights.items() if name not in own})
    assert [layer.name.removesuffix(".transformer_blocks.0") for layer in adapter.described] == settings["layers"]
    return DiffusersUNet(unet, adapter, torch.linspace(0.9, 0.1, 1000))


def test_the_published_size():
    """In SD2.1-base the adapter has the published number of tensors and of numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        heads = [5, 10, 20, 20]
        unet = UNet2DConditionModel(attention_head_dim=heads, cross_attention_dim=1024, use_linear_projection=True)
        adapter = Adapter(layers(unet))
    assert [layer.heads for layer in adapter.described] == [5, 5, 10, 10, *[20] * 6, 10, 10, 10, 5, 5, 5]
    assert len(adapter.published_parameters()) == 113
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 49_599_056


def test_captured_features(official, network):
    captures_as_published(network, official)


@pytest.mark.parametrize("case", CASES)
def test_forward(official, network, case):
    predicts_as_published(network, official, case)


def test_the_frozen_network_alone(official, network):
    with torch.no_grad():
        found = network.unet(official["i.x"], torch.full((2,), TIMESTEP), official["i.ctx"]).sample
    assert relative(found, official["o.main.adapter_off"]) < 2e-5


def test_loss_and_gradients(official, network):
    learns_as_published(network, official)
