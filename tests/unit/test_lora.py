"""Low-rank factors beside layers: what they add, what they export, what they are drawn from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from likeness.core.lora.low_rank import Rows, attached_lora, attention_layers, factors, new_adapters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.other = nn.Linear(5, 6), nn.Linear(6, 6)
        self.to_k = nn.Conv2d(6, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.to_k(self.other(self.to_q(x)).movedim(-1, 1))


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
    assert sorted(layers) == ["net.to_k", "net.to_q"]
    with attached_lora(layers, new_adapters(layers, 2, 0)):
        assert torch.equal(net(x), block()(x))


class Joint(nn.Module):
    """The attention of a network with a stream for the image and one for the prompt."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))
        self.to_rest, self.q_rms_norm_t = nn.Linear(2, 2), nn.LayerNorm(2)


def test_both_streams_of_an_attention_are_chosen():
    parts = ("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t")  # as HiDream names them
    more = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # as Qwen-Image
    net = nn.ModuleDict({"a": Joint(*parts), "b": Joint(*more)})
    net["b"].to_out = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    expected = [f"net.a.{name}" for name in parts] + [f"net.b.{name}" for name in (*more, "to_out.0")]
    assert sorted(attention_layers(net, "net")) == sorted(expected)


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
    all_of_them, alone = new_adapters(layers, 2, 0), new_adapters({"net.to_k": layers["net.to_k"]}, 2, 0)
    assert torch.equal(all_of_them["net.to_k"].down, alone["net.to_k"].down)
    other = new_adapters(layers, 2, 1)
    assert not torch.equal(all_of_them["net.to_k"].down, other["net.to_k"].down)
    assert torch.equal(state, torch.get_rng_state())
    assert sorted(factors(alone)) == ["net.to_k.down", "net.to_k.up"]
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
    with pytest.raises(ValueError, match="linear or 2-D convolution"):
        new_adapters({"x": nn.LayerNorm(4)}, 2, 0)


def test_adapters_of_some_rows_of_a_layer_are_those_of_the_weight_merged_in_rows():
    net, x = nn.Linear(5, 11), torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    layers = {"q": Rows(net, 0, 3), "v": Rows(net, 6, 3)}
    adapters = trained(layers)
    with attached_lora(layers, adapters):
        expected = net(x)
    plain = net(x)
    assert torch.equal(expected[:, 3:6], plain[:, 3:6]) and torch.equal(expected[:, 9:], plain[:, 9:])
    for name, place in layers.items():
        named = adapters[name].peft_tensors(name)
        assert list(named) == [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
        with torch.no_grad():
            net.weight[place.start : place.start + place.count] += (
                named[f"{name}.lora_B.weight"] @ named[f"{name}.lora_A.weight"]
            )
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, plain)
