"""A LoRA beside quantised layers: right where a layer runs by itself, refused by name where it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from likeness.tests import gradients

from .test_families import FAMILIES
from .test_lora_types import lora_of


class Packed(nn.Module):
    """As packs for GGUF and 4-bit files have them: no layer of torch, bytes for a weight, unpacked when it runs."""

    def __init__(self, layer: nn.Linear, sized: bool) -> None:
        super().__init__()
        if sized:
            self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        self.step = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x) * self.step, self.bias)


def packed(name: str, sized: bool = True):
    """The model with packed layers in its blocks, and the one that has the unpacked values."""
    models = [FAMILIES[name].model() for _ in range(2)]
    with torch.inference_mode():
        for index, model in enumerate(models):
            for owner in list(model.model.diffusion_model.modules()):
                for path, layer in list(owner.named_children()):
                    if isinstance(layer, nn.Linear):
                        small = Packed(layer, sized)
                        layer.weight.copy_(small.weight * small.step)
                        if index == 0:
                            setattr(owner, path, small)
    return models


@pytest.mark.parametrize("name", ["Z-Image", "FLUX.1"])
def test_the_gradient_beside_packed_layers_is_that_beside_the_unpacked(name):
    family = FAMILIES[name]
    small, whole = (gradients.check_lora(model, family.prompt(1), family.latents()) for model in packed(name))
    assert abs(whole.numeric) > 1e-3 and small.relative_error < 0.01, small
    assert abs(small.analytic - whole.analytic) < 1e-3 * abs(whole.analytic)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
def test_a_lora_is_trained_beside_weights_that_are_cast_and_they_collect_no_gradient(stored):
    family = FAMILIES["Z-Image"]
    model = family.model()
    with torch.inference_mode():
        model.model.diffusion_model.to(stored)
        model.set_model_compute_dtype(torch.float32)
        weights = [weight.requires_grad_(True) for weight in model.model.diffusion_model.parameters()]  # as older cores
    wanted = [(weight.requires_grad, weight.is_inference()) for weight in weights]
    _, _, lora, loss = lora_of(family, "LoRA", model=model)
    assert all(weight.grad is None for weight in weights)
    assert wanted == [(weight.requires_grad, weight.is_inference()) for weight in weights]
    assert len(set(loss["loss"])) == 2 and all(value.any() for name, value in lora.items() if "lora_up" in name)


@pytest.mark.usefixtures("own_folders")
def test_layers_that_do_not_tell_their_size_are_refused_by_name():
    model, _ = packed("Z-Image", sized=False)
    with pytest.raises(ValueError, match="of this ZImage model.*Packed.*load it in bf16, fp16, fp32 or fp8"):
        lora_of(FAMILIES["Z-Image"], "LoRA", model=model)
    with pytest.raises(ValueError, match="from torch.int8: .*or train a LoRA"):
        lora_of(FAMILIES["Z-Image"], "LoRA", model=model, method="full weights")


@pytest.mark.usefixtures("own_folders")
def test_one_layer_of_its_own_kind_among_others_is_refused_by_name():
    model = FAMILIES["Z-Image"].model()
    with torch.inference_mode():
        attention = model.model.diffusion_model.layers[1].attention
        attention.out = Packed(attention.out, sized=False)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.out.*Packed"):
        lora_of(FAMILIES["Z-Image"], "LoRA", model=model)
