"""Inversion of every flow family: the noise brings the image back through stock samplers, with and without guidance.

Inversion for few steps is that of every family.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch

from .methods import run_node
from .test_families import FAMILIES, each_family, predicted
from .test_inversion import sigmas as levels

STEPS, CFG = 2, 4.0
FLOW = [name for name in FAMILIES if name not in ("PixArt", "HunyuanDiT", "Cosmos-Predict2")]
each_flow = pytest.mark.parametrize("name", FLOW)
others = [pytest.param(name, marks=pytest.mark.slow) for name in FLOW[1:]]
first_flow = pytest.mark.parametrize("name", [FLOW[0], *others])


class Setting:
    """A family whose network says little, as a trained one does from step to step."""

    def __init__(self, name: str) -> None:
        family = FAMILIES[name]
        self.model, self.latent = family.model(), {"samples": family.latents()}
        self.model.model.diffusion_model.register_forward_hook(lambda _net, _inputs, out: 0.05 * out)
        self.source, self.edit, self.empty = (family.prompt(seed) for seed in (1, 2, 3))
        self.sigmas = levels(self.model, STEPS, "simple")

    def inverted(self, **changes) -> SimpleNamespace:
        from likeness.nodes.inversion import LikenessInvert

        inputs = {"model": self.model, "positive": self.source, "latent": self.latent, "sigmas": self.sigmas}
        outputs = run_node(LikenessInvert, **inputs, **{"label": "fixed point", "iterations": 4, **changes})
        return SimpleNamespace(trajectory=outputs[0], latent=outputs[1], noise=outputs[3])

    def way_back(self, trajectory, method: str) -> tuple:
        """MODEL and negative."""
        from likeness.nodes.inversion import LikenessNullText

        inputs = {"model": self.model, "positive": self.source, "negative": self.empty, "trajectory": trajectory}
        settings = {"cfg": CFG, "inner_steps": 1, "epsilon": 0.0, "learning_rate": 1e-7, "start": "prompt"}
        negative, _, _, model = run_node(LikenessNullText, **inputs, method=method, **settings)
        return model, negative

    def play(self, model, noise, latent, negative, cfg: float, positive=None, sampler=None) -> torch.Tensor:
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive or self.source, negative)
        guider.set_cfg(cfg)
        inputs = {"noise": noise, "guider": guider, "sigmas": self.sigmas, "latent_image": {**latent}}
        euler = sampler or comfy.samplers.sampler_object("euler")
        return run_node(SamplerCustomAdvanced, **inputs, sampler=euler)[0]["samples"]

    def misses(self, samples: torch.Tensor) -> float:
        image = self.latent["samples"]
        return float((samples - image).norm() / image.norm())


@functools.cache
def _setting(name: str) -> Setting:
    return Setting(name)


def setting_of(name: str) -> Setting:
    """The family's, its network made once."""
    return copy.copy(_setting(name))


@functools.cache
def as_published(name: str) -> SimpleNamespace:
    return setting_of(name).inverted(label="published")


def test_the_families_are_those_that_mix_noise_in():
    from likeness.core.inversion.host.ddim import adds_noise

    mixing = [name for name in FAMILIES if not adds_noise(setting_of(name).model.get_model_object("model_sampling"))]
    assert mixing == FLOW


def comes_back(setting: Setting, found: SimpleNamespace, methods: tuple[str, ...]) -> None:
    """With guidance."""
    guided = setting.misses(setting.play(setting.model, found.noise, found.latent, setting.empty, CFG))
    for method in methods:
        model, negative = setting.way_back(found.trajectory, method)
        missed = setting.misses(setting.play(model, found.noise, found.latent, negative, CFG))
        assert missed < 1e-5 and missed < 0.1 * guided, (method, missed, guided)


@each_flow
def test_the_image_comes_back_through_stock_samplers(name, own_folders):
    setting = setting_of(name)
    found = setting.inverted()
    back = setting.play(setting.model, found.noise, found.latent, setting.empty, 1.0)
    assert setting.misses(back) < 1e-5 and found.trajectory.error < 1e-5
    comes_back(setting, found, ("null-text",))


@first_flow
def test_the_image_comes_back_by_what_learns_nothing(name, own_folders):
    setting = setting_of(name)
    comes_back(setting, setting.inverted(), ("negative prompt", "direct", "direct edit"))


@each_flow
def test_direct_edit_sees_image_and_edit_as_the_inversion_saw_the_image(name):
    """Without the landing the image returns too, and the edit is that of the steps written out."""
    from dataclasses import replace

    from likeness.core.inversion.host.landing import Landing, attach_landing

    setting = setting_of(name)
    found = as_published(name)
    path, sigmas = found.trajectory.latents, found.trajectory.sigmas
    model, _ = setting.way_back(found.trajectory, "direct edit")
    landing = next(each for each in model.model_options["sampler_post_cfg_function"] if isinstance(each, Landing))
    alone = attach_landing(setting.model, replace(landing, targets={}))
    alone.remove_wrappers_with_key("outer_sample", "likeness.guidance.landing")
    plain, back = (
        setting.misses(setting.play(each, found.noise, found.latent, setting.empty, 1.0))
        for each in (setting.model, alone)
    )
    assert back < 1e-5 and back < 0.1 * plain

    x = path[0].clone()
    for step in range(STEPS):
        high, low = sigmas[step], sigmas[step + 1]
        scale = ((high**2 + (1 - high) ** 2) / (low**2 + (1 - low) ** 2)).sqrt()
        moved = x + path[step + 1] * scale - path[step]
        x = x + (low - high) * (moved - predicted(setting.model, setting.edit, moved, high.view(1))) / high
    edit = setting.play(alone, found.noise, found.latent, setting.empty, 1.0, positive=setting.edit)
    written = setting.model.get_model_object("latent_format").process_out(x)
    torch.testing.assert_close(edit, written, atol=1e-5 * float(written.std()), rtol=1e-4)


@each_family
def test_few_steps_are_inverted_for_euler_and_the_report_is_true(name):
    """Where noise is added, from the second level on, as in the reference code: at the first, a step says little of its
    start, and the iterations need long.
    """
    from likeness.nodes.inversion import LikenessRenoise

    setting, flow = setting_of(name), name in FLOW
    if not flow:
        setting.sigmas = levels(setting.model, 3, "simple")[1:]
    inputs = {"model": setting.model, "positive": setting.source, "latent": setting.latent, "sigmas": setting.sigmas}
    inputs |= {"seed": 3, "iterations": 9 if flow else 20, "averaged": 2, "kl_weight": 1e-7}
    for sampler, weight in (("euler_ancestral", 0.0), ("euler", 20.0)) if flow else ():
        with pytest.raises(ValueError, match="flow model.*choose the sampler euler and correlation_weight 0"):
            run_node(LikenessRenoise, **inputs, sampler=sampler, correlation_weight=weight)
    latent, sampler, used, report, noise = run_node(LikenessRenoise, **inputs, sampler="euler", correlation_weight=0.0)
    assert torch.equal(used, setting.sigmas) and "missed by 0.0 %" in report
    back = setting.play(setting.model, noise, latent, setting.empty, 1.0, sampler=sampler)
    assert setting.misses(back) < 1e-3


@first_flow
def test_reference_guidance_is_played_again_by_the_stock_sampler(name, own_folders):
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    from likeness.nodes.reference import LikenessReferenceGuide

    setting = setting_of(name)
    height, width = FAMILIES[name].size
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2] = 1
    inputs = {"model": setting.model, "positive": setting.edit, "negative": setting.empty, "mask": mask, "cfg": CFG}
    inputs |= {"noise": Noise_RandomNoise(3), "trajectory": as_published(name).trajectory}
    settings = {"inner_steps": 1, "start_percent": 0.1, "end_percent": 0.9, "learning_rate": 0.1}
    latent, model, negative, loss, _ = run_node(LikenessReferenceGuide, **inputs, **settings)
    empty = {"samples": torch.zeros_like(latent["samples"])}
    again, plain = (
        setting.play(each, inputs["noise"], empty, prompt, CFG, positive=setting.edit)
        for each, prompt in ((model, negative), (setting.model, setting.empty))
    )
    size = float(plain.std())
    assert float((again - latent["samples"]).abs().max()) < 1e-5 * size < float((again - plain).abs().max())
