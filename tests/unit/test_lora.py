"""Low-rank factors beside layers: what they add, what they export, what they are drawn from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from likeness.core.lora.low_rank import (
    ALL,
    Rows,
    attached_lora,
    attention_layers,
    block_layers,
    factors,
    file_tensors,
    new_adapters,
)

NAME = "net.attention.wide.0"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.wide = 2, nn.Sequential(nn.Linear(6, 4), nn.ReLU())
        self.narrow, self.norm, self.inner = nn.Linear(5, 6), nn.LayerNorm(6), Modulation()

    def forward(self, x):
        return self.wide(self.inner.lin(self.norm(self.narrow(x))))


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first, self.attention, self.last = 2, nn.Linear(5, 5), Attention(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.attention(self.first(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.blocks = nn.Sequential(nn.Linear(5, 5)), nn.ModuleList([Block()])
        self.refiner, self.out = Attention(), nn.Linear(4, 4)


def block() -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block()


def trained(layers) -> dict:
    adapters = new_adapters(layers, 2, seed=0)
    for adapter in adapters.values():
        with torch.no_grad():
            adapter.up.copy_(torch.randn(adapter.up.shape, generator=torch.Generator().manual_seed(1)))
    return adapters


def test_only_attention_layers_are_chosen_and_nothing_changes_at_first():
    net, x = block(), torch.randn(1, 4, 4, 5, generator=torch.Generator().manual_seed(2))
    layers = attention_layers(net, "net")
    assert sorted(layers) == ["net.attention.narrow", "net.attention.wide.0"]
    with attached_lora(layers, new_adapters(layers, 2, 0)):
        assert torch.equal(net(x), block()(x))


def test_the_layers_of_a_network_are_those_of_its_blocks():
    attention, everything = block_layers(Network(), "net"), block_layers(Network(), "net", ALL)
    assert sorted(attention) == ["net.blocks.0.attention.narrow", "net.blocks.0.attention.wide.0"]
    others = ["net.blocks.0.attention.inner.lin", "net.blocks.0.first", "net.blocks.0.last"]
    assert sorted(everything) == sorted([*attention, *others])
    assert block_layers(nn.Sequential(nn.Linear(5, 5)), "net", ALL) == {}


def test_exported_factors_merged_into_the_weights_give_the_same_output():
    net, x = block(), torch.randn(1, 4, 4, 5, generator=torch.Generator().manual_seed(2))
    layers = attention_layers(net, "net")
    adapters = trained(layers)
    with attached_lora(layers, adapters):
        expected = net(x)
    assert not torch.allclose(expected, net(x))
    for name, layer in layers.items():
        named = adapters[name].tensors(name)
        up, down, alpha = (named[f"{name}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        with torch.no_grad():
            layer.weight += (alpha / down.shape[0]) * (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_drawn_from_seed_and_name_alone():
    layers = attention_layers(block(), "net")
    state = torch.get_rng_state()
    all_of_them, alone = new_adapters(layers, 2, 0), new_adapters({NAME: layers[NAME]}, 2, 0)
    assert torch.equal(all_of_them[NAME].down, alone[NAME].down)
    other = new_adapters(layers, 2, 1)
    assert not torch.equal(all_of_them[NAME].down, other[NAME].down)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(factors(alone)) == [f"{NAME}.down", f"{NAME}.up"]
    assert all(value.requires_grad and value.dtype == torch.float32 for value in factors(alone).values())


def test_factors_stay_in_float32_and_the_output_keeps_its_precision():
    net = block().to(torch.bfloat16)
    layers = attention_layers(net, "net")
    adapters = trained(layers)
    x = torch.randn(1, 4, 4, 5, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    with attached_lora(layers, adapters):
        out = net(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(value.grad.dtype == torch.float32 and bool(value.grad.any()) for value in factors(adapters).values())


def test_a_layer_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="needs a linear layer"):
        new_adapters({"x": nn.Conv2d(4, 4, 1)}, 2, 0)


def test_adapters_of_some_rows_of_a_layer_are_those_of_the_weight_merged_in_rows():
    net, x = nn.Linear(5, 11), torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    layers = {"q": Rows(net, 0, 3), "v": Rows(net, 6, 3)}
    adapters = trained(layers)
    with attached_lora(layers, adapters):
        expected = net(x)
    plain = net(x)
    assert torch.equal(expected[:, 3:6], plain[:, 3:6]) and torch.equal(expected[:, 9:], plain[:, 9:])
    for name, place in layers.items():
        named = file_tensors(name, *adapters[name].product(), peft=True)
        assert list(named) == [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
        with torch.no_grad():
            net.weight[place.start : place.start + place.count] += (
                named[f"{name}.lora_B.weight"] @ named[f"{name}.lora_A.weight"]
            )
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, plain)
