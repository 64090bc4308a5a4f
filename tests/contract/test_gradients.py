"""Every gradient the pack relies on, against finite differences, with and without checkpointing."""

from __future__ import annotations

import pytest
import torch

from likeness.tests import gradients

from .. import tiny_models
from .methods import METHODS, Setting
from .setting import autoencoder

LIMIT = 0.01
MODELS = {**tiny_models.FAMILIES, **tiny_models.TRANSFORMERS}


def model_of(family: str):
    """The family's MODEL, for all checks: none changes its weights."""
    return tiny_models.shared((family, 0), MODELS[family][0])


def through_the_model() -> list:
    """Checkpointing by default on one model of each kind: it asks for the kinds of blocks alone."""
    usual = ("sd1", "flux")
    return [
        pytest.param(family, checkpointing, id=f"{family}-{name}", marks=marks)
        for family in MODELS
        for checkpointing, name in ((False, "plain"), (True, "checkpointed"))
        for marks in [pytest.mark.slow if checkpointing and family not in usual else ()]
    ]


@pytest.mark.parametrize("what", ["conditioning", "latent", "lora", "weights"])
@pytest.mark.parametrize(("family", "checkpointing"), through_the_model())
def test_through_the_model(family, what, checkpointing):
    check = getattr(gradients, f"check_{what}")
    with torch.inference_mode():
        model, prompt = model_of(family), tiny_models.prompt(family, 1)
        channels = model.model.latent_format.latent_channels
        latent = torch.randn(1, channels, 9, 7, generator=torch.Generator().manual_seed(3))
        found = check(model, prompt, latent, checkpointing=checkpointing)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.mark.parametrize("family", ["sd1", "flux"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_cast_anyway_are_not_copied(family, stored, monkeypatch):
    """Stored in fp8 or half precision and computed in float32: the same gradient, without a second copy of them."""
    from likeness.core.session import weights

    def check(layers: int):
        copied = []
        ordinary = weights._normal
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(weights, "_normal", lambda *value: copied.append(value[0]) or ordinary(*value))
            model = MODELS[family][0]()
            model.model.diffusion_model.to(stored)
            model.set_model_compute_dtype(torch.float32)
            latent = torch.randn(1, model.model.latent_format.latent_channels, 8, 8)
            latent.copy_(torch.linspace(-1, 1, latent.numel()).view_as(latent))
            found = gradients.check_lora(model, tiny_models.prompt(family, 1), latent)
        assert len([value for value in copied if value.ndim > 1 and value.dtype == stored]) == layers
        return found

    found = check(0)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found
    monkeypatch.setattr(weights, "_is_cast", lambda *_weight: False)
    count = sum(value.ndim > 1 for value in model_of(family).model.diffusion_model.parameters())
    assert check(count) == found


def test_a_forward_that_another_pack_has_set_comes_back():
    from likeness.core.session.checkpointing import checkpointed

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    forward = layer.forward = lambda x: 3 * x
    x = torch.ones(1, 2, requires_grad=True)
    with checkpointed(torch.nn.Sequential(layer, other), ["Linear"]):
        assert layer.forward is not forward and torch.equal(layer(x), 3 * x)
    assert layer.forward is forward and "forward" not in other.__dict__


def test_through_the_models_blocks_a_control_net_writes_to():
    from nodes import ControlNetApplyAdvanced

    from .methods import run_node

    with torch.inference_mode():
        prompt, picture = (
            tiny_models.prompt("sd1", 1),
            torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9)),
        )
        inputs = {"positive": prompt, "negative": prompt, "control_net": tiny_models.controlnet(), "image": picture}
        controlled = run_node(ControlNetApplyAdvanced, **inputs, strength=1.0, start_percent=0.0, end_percent=1.0)[0]
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        for checkpointing in (False, True):
            found = gradients.check_conditioning(model_of("sd1"), controlled, latent, checkpointing=checkpointing)
            assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["taesd", "kl_autoencoder"])
def test_through_the_autoencoder(kind, checkpointing):

    with torch.inference_mode():
        latent = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(3))
        found = gradients.check_vae_decode(getattr(tiny_models, kind)(), latent, checkpointing=checkpointing)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


def test_through_the_text_encoder(clip):
    found = gradients.check_clip_text(clip)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("what", ["lora", "weights"])
def test_through_model_and_text_encoder_together(what, checkpointing, clip):
    model = model_of("sd1")
    before = dict(clip.cond_stage_model.named_parameters())
    with torch.inference_mode():
        latent = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(3))
        check = getattr(gradients, f"check_{what}")
        found = check(model, tiny_models.prompt("sd1", 1), latent, checkpointing=checkpointing, clip=clip)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found
    after = dict(clip.cond_stage_model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_through_the_pooled_vector_of_two_text_encoders():

    with torch.inference_mode():
        latent = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(3))
        found = gradients.check_lora(
            model_of("sdxl"), tiny_models.prompt("sdxl", 1), latent, clip=tiny_models.clip_xl()
        )
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


def test_the_check_itself_notices_a_wrong_gradient():
    from likeness.tests.gradients import gradient_check

    point = torch.linspace(-1, 1, 12)
    right = gradient_check("right", lambda x: (x**3).sum(), point)
    wrong = gradient_check("wrong", lambda x: (x**3 + 0.5 * (x.detach() * 2)).sum(), point)
    assert right.relative_error < 1e-3 and wrong.relative_error > 0.2


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "siso"])
def test_weights_loaded_outside_of_inference_mode_collect_no_gradients(name):
    """Another pack's loader leaves ordinary parameters, of which torch would keep a gradient each."""
    setting = Setting()
    for part in setting.model.model.modules():
        for key, value in part._parameters.items():
            part._parameters[key] = None if value is None else torch.nn.Parameter(value.clone().detach())
    parameters = [*setting.model.model.parameters(), *autoencoder().first_stage_model.parameters()]
    asked = [value.requires_grad for value in parameters]
    next(method for method in METHODS if method.name == name).fit(setting, steps=2)
    assert all(value.grad is None for value in parameters)
    assert [value.requires_grad for value in parameters] == asked and any(asked)
