"""Every transformer family of the running ComfyUI: guidance, inversion, reference, and what is refused with a reason.

tests/model_table.py makes the table of docs/models.md of these tests and of test_families.py.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch

from .. import model_table
from .methods import _Noise, run_node, sample
from .test_families import FAMILIES, each_family, model_of, predicted

LEVELS = 2


def with_lora(family, model, seed: int = 1):
    """A MODEL with a LoRA on all attention layers, as a stock loader makes it."""
    import comfy.sd

    from likeness.core.lora.host.layers import trained_layers
    from likeness.core.lora.low_rank import factors, new_adapters

    layers = trained_layers(model.model, kind="attention")
    adapters = new_adapters(layers.layers, 2, 0, deviation=0.2)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, layers.tensors(factors(adapters)), 1.0, 0.0)[0]


def near(found: torch.Tensor, wanted: torch.Tensor, apart: torch.Tensor) -> None:
    """Equal, and that says something, as another model's prediction is not near."""
    error, effect = float((found - wanted).abs().mean()), float((apart - wanted).abs().mean())
    assert error < 1e-5 * float(wanted.std()) and error < 0.01 * effect, (error, effect)


@each_family
def test_guidance_is_the_papers_equation(name):
    """SINE's equation 3 in one step, and personalization guidance from the base model without a prompt."""
    from likeness.nodes.guidance import LikenessGuidance, LikenessPersonalizationGuidance

    family = FAMILIES[name]
    model, source, target = family.model(), family.prompt(1), family.prompt(2)
    tuned = with_lora(family, model)
    sigmas = model.get_model_object("model_sampling").sigmas
    sigma = sigmas[len(sigmas) // 2].float().view(1)
    x = family.latents(2) * max(1.0, float(sigma))
    of_base, of_tuned = predicted(model, target, x, sigma), predicted(tuned, source, x, sigma)
    shared = {"base_weight": 0.7, "end_percent": 1.0}
    guided = run_node(LikenessGuidance, model=model, tuned=tuned, tuned_positive=source, **shared)[0]
    near(predicted(guided, target, x, sigma), 0.7 * of_base + 0.3 * of_tuned, of_base)
    weakened = run_node(LikenessPersonalizationGuidance, model=model, tuned=tuned, weak=0.0)[0]
    null, cfg = family.prompt(3), 3.0
    wanted = (1 - cfg) * predicted(model, null, x, sigma) + cfg * predicted(tuned, target, x, sigma)
    near(predicted(weakened, target, x, sigma, null, cfg), wanted, of_base)


@functools.cache
def inverted(name: str) -> tuple:
    from comfy.samplers import calculate_sigmas

    from likeness.nodes.inversion import LikenessInvert

    family, model = FAMILIES[name], model_of(name)
    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", LEVELS)
    inputs = {"model": model, "positive": family.prompt(1), "latent": {"samples": 0.5 * family.latents()}}
    return run_node(LikenessInvert, **inputs, sigmas=sigmas, label="midpoint", check=False)


def played(model, positive, negative, noise, latent, sigmas, cfg: float) -> torch.Tensor:
    """What SamplerCustomAdvanced makes with euler."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    links = {"guider": guider, "sampler": comfy.samplers.sampler_object("euler"), "noise": noise}
    latent = {"samples": latent["samples"].clone()}
    return run_node(SamplerCustomAdvanced, **links, sigmas=sigmas, latent_image=latent)[0]["samples"]


@pytest.mark.usefixtures("own_folders")
@each_family
def test_an_inverted_image_comes_back(name):
    """Guided, by direct inversion."""
    from likeness.nodes.inversion import LikenessNullText

    family, cfg = FAMILIES[name], 2.0
    model, positive, negative = model_of(name), family.prompt(1), family.prompt(3)
    trajectory, latent, sigmas, noise, _ = inverted(name)
    back = {"model": model, "positive": positive, "negative": negative, "trajectory": trajectory, "cfg": cfg}
    negative, _, _, pinned = run_node(LikenessNullText, **back, method="direct", start="prompt", inner_steps=1)
    found = played(pinned, positive, negative, noise, latent, sigmas, cfg)
    torch.testing.assert_close(found, 0.5 * family.latents(), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("own_folders")
@each_family
def test_a_reference_guided_image_is_made_again_by_the_stock_sampler(name):
    from likeness.nodes.reference import LikenessReferenceGuide

    family, cfg = FAMILIES[name], 2.0
    model, positive, negative = model_of(name), family.prompt(2), family.prompt(3)
    trajectory, _, sigmas, *_ = inverted(name)
    mask = torch.zeros(1, *family.size)
    mask[:, : family.size[0] // 2] = 1
    inputs = {"model": model, "positive": positive, "negative": negative, "mask": mask, "cfg": cfg, "inner_steps": 1}
    inputs |= {"noise": _Noise(3), "trajectory": trajectory, "start_percent": 0.1, "end_percent": 1.0}
    latent, guided, negatives, *_ = run_node(LikenessReferenceGuide, **inputs, learning_rate=0.1)
    empty = {"samples": torch.zeros(family.latent)}
    again = played(guided, positive, negatives, _Noise(3), empty, sigmas, cfg)
    plain = sample(model, positive, negative, empty, steps=LEVELS, cfg=cfg, seed=3)
    error, effect = (float((again - other).abs().max()) for other in (latent["samples"], plain))
    assert error < 1e-4 * float(again.std()) and error < 0.01 * effect, (error, effect)


def attempted(step: str, name: str) -> Any:
    """Run a step as far as a transformer gets."""
    from likeness.core.ezigen.host.layers import places
    from likeness.nodes.inspect import LikenessInspect
    from likeness.nodes.position_map import LikenessPositionMap

    family, model = FAMILIES[name], model_of(name)
    prompt, latent = family.prompt(1), {"samples": family.latents()}
    if step == "Replace, Inspect":
        inputs = {"conditioning": prompt, "latent": latent, "tokens": 2, "columns": 2, "seed": 0}
        return run_node(LikenessInspect, model=model, **inputs)
    if step == "Patches":
        return run_node(LikenessPositionMap, model=model, cells=16, interpolation="bilinear")
    return places(model.model)


@pytest.mark.parametrize("step", [step.name for step in model_table.STEPS if step.refused])
@each_family
def test_what_the_table_calls_refused_is_refused_with_its_reason(name, step):
    entry = next(each for each in model_table.STEPS if each.name == step)
    if entry.each and name not in entry.left:
        attempted(step, name)
        return
    with pytest.raises(ValueError, match=entry.says):
        attempted(step, name)


@pytest.mark.parametrize("step", [step for step in model_table.STEPS if step.each], ids=lambda step: step.name)
def test_the_table_calls_tested_what_a_test_runs_with(step):
    module = importlib.import_module(f"{__package__}.{step.each.partition('.py::')[0]}")
    said = model_table.cells(step)
    assert {name for name in FAMILIES if said[name] == model_table.TESTED} == set(
        module.each_family.args[1]
    ) - step.left
