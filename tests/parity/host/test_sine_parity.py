"""SINE's guidance and position map, through ComfyUI's samplers and UNet, against the numbers of the authors' code."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from likeness.core.denoiser import Prompt
from likeness.core.session.session import Session
from likeness.core.sine.fine_tune import FineTune, FineTuneSettings, Samples
from likeness.core.sine.guidance import percent_of
from likeness.core.sine.host.guidance import SubjectModel, with_guidance
from likeness.core.sine.host.position_map import with_position_map
from likeness.core.sine.position_map import position_map, sinusoids

from ...tiny_models import CPU, unet_config
from ..unets import SD_SCALE, arrays

COEFFICIENTS = {"base": (0.9, 0.7, 1.0), "tuned 1": (0.6, -0.5, 1.1), "tuned 2": (1.1, 0.3, 0.8)}
CASES = {
    "s_paper": (7.5, [("c1", 1 - 0.7, 400, 1000)]),
    "s_cli_default_range": (7.5, [("c1", 1 - 0.5, 1, 400)]),
    "s_off": (7.5, [("c1", 1 - 0.7, 1000, 1000)]),
    "m_readme": (10.0, [("c1", 0.4, 400, 1000), ("c2", 0.5, 400, 1000)]),
    "m_one": (7.5, [("c1", 0.3, 400, 1000)]),
}
"""Case -> cfg, and for each tuned model its prompt, weight and the timesteps of its window (both included)."""


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("sine.npz", without=("w1_crash", "ds_caption"))


class Toy(torch.nn.Module):
    """The denoiser in closed form that the authors' sampler was run with; counts its evaluations."""

    dtype = torch.float32

    def __init__(self, which: str) -> None:
        super().__init__()
        self.a, self.b, self.g = COEFFICIENTS[which]
        self.calls = 0

    def forward(self, x, timesteps, context=None, **_more):
        self.calls += x.shape[0]
        said = context.mean((1, 2)).view(-1, 1, 1, 1)
        return self.g * torch.tanh(self.a * x + self.b * said + 0.001 * timesteps.view(-1, 1, 1, 1))


def toy(which: str):
    """The same as a MODEL of ComfyUI's SD1.x family."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15({"dtype": torch.float32, "disable_unet_model_creation": True})
    with torch.inference_mode():
        model = comfy.model_base.BaseModel(config, device="cpu")
        model.diffusion_model = Toy(which)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def window(low: int, high: int) -> tuple[float, float]:
    """The authors' closed window of timesteps in percent; ours is open at its end, which lies half a step lower."""
    end = 0.0 if low >= 1000 else min(1.0, percent_of(low - 0.5))
    return min(max(0.0, percent_of(high)), end), end


class Given:
    """Euler from x as it is given, where ComfyUI's sampler would make it from noise."""

    def __new__(cls):
        import comfy.k_diffusion.sampling
        import comfy.samplers

        class Sampler(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
                return comfy.k_diffusion.sampling.sample_euler(
                    model_wrap,
                    noise,
                    sigmas,
                    extra_args=extra_args,
                    disable=True,
                    callback=lambda step: callback(step["i"], step["denoised"], step["x"], len(sigmas)),
                )

        return Sampler()


@pytest.mark.parametrize("case", CASES)
def test_trajectories(official, case):
    """The authors' DDIM from x_T to its last x, as ComfyUI's Euler steps on the guided MODEL."""
    import comfy.samplers

    cfg, tuned = CASES[case]
    base, models = toy("base"), [toy(f"tuned {index + 1}") for index in range(len(tuned))]
    subjects = [
        SubjectModel(model, [[official[f"g_{prompt}"], {}]], weight, *window(low, high))
        for model, (prompt, weight, low, high) in zip(models, tuned, strict=True)
    ]
    timesteps = official[f"g_{case}_tsteps"].tolist()
    seen = []
    with torch.inference_mode():
        table = base.get_model_object("model_sampling").sigmas
        sigmas = torch.stack([*(table[t] for t in timesteps), table[0]])  # their last level is alpha_bar[0], not clean
        guider = comfy.samplers.CFGGuider(with_guidance(base, subjects))
        guider.set_conds([[official["g_c"], {}]], [[official["g_uc"], {}]])
        guider.set_cfg(cfg)
        start = official["g_x_T"] * (1 + sigmas[0] ** 2).sqrt()  # x_T has variance 1 at their first timestep
        zeros = torch.zeros_like(start)
        final = guider.sample(start, zeros, Given(), sigmas, callback=lambda *step: seen.append(step), seed=0)
    for step, denoised, x, _ in seen:
        torch.testing.assert_close(denoised, official[f"g_{case}_pred_x0"][step], atol=1e-4, rtol=1e-5)
        if step:
            scaled = x / (1 + sigmas[step] ** 2).sqrt()
            torch.testing.assert_close(scaled, official[f"g_{case}_x"][step - 1], atol=1e-4, rtol=0)
    scaled = SD_SCALE * final / (1 + table[0] ** 2).sqrt()  # a guider returns latents as the VAE takes them
    torch.testing.assert_close(scaled, official[f"g_{case}_final"], atol=1e-4, rtol=0)

    samples = len(start)
    assert base.model.diffusion_model.calls == 2 * samples * len(timesteps)
    for model, (_, _, low, high) in zip(models, tuned, strict=True):
        guided_steps = sum(low <= t <= high for t in timesteps)
        assert model.model.diffusion_model.calls == samples * guided_steps  # theirs: twice as many in every step


def test_table_and_parts_of_the_map(official):
    torch.testing.assert_close(sinusoids(128, 160), official["pe_table_160"], atol=2e-5, rtol=0)
    for b, box in enumerate(official["boxes"]):
        for s, size in enumerate(official["sizes"].tolist()):
            for interpolation in ("bilinear", "nearest"):
                found = position_map(320, 128, box[None], tuple(size), interpolation)[0, ::16]
                expected = official[f"pe_{interpolation}_b{b}_s{s}"]
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def unet():
    """The authors' tiny UNet in ComfyUI's own class, as a MODEL."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = unet_config(64, 16, num_heads=4, num_head_channels=-1, transformer_depth_output=[1] * 4)
    model_config = comfy.supported_models.SD15(dict(config))
    model_config.unet_config["num_heads"] = 4  # the SD15 class sets 8
    with torch.inference_mode():
        model = comfy.model_base.BaseModel(model_config, device="cpu")
        for name, value in model.diffusion_model.named_parameters():
            seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
            drawn = np.random.RandomState(seed).standard_normal(tuple(value.shape)).astype(np.float32)
            value.copy_(torch.from_numpy(0.08 * drawn) + float(name.endswith("norm.weight")))
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


@pytest.mark.parametrize("interpolation", ["plain", "bilinear", "nearest"])
def test_unet_with_the_map(official, unet, interpolation):
    model, key = unet, "unet_plain"
    if interpolation != "plain":
        model, key = with_position_map(unet, 128, interpolation), f"unet_{interpolation}_whole"
    x, t, context = (official[f"unet_{name}"] for name in ("x", "t", "ctx"))
    with torch.inference_mode():
        options = model.model_options["transformer_options"]
        found = model.model.diffusion_model(x, t, context=context, transformer_options=options)
    torch.testing.assert_close(found, official[key], atol=1e-5, rtol=0)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(("weight", "name"), [(0.0, "loss_plain"), (1.0, "loss_patch")])
def test_loss_through_the_session(official, weight, name):
    x0, noise = normal(21, 2, 4, 64, 64), normal(22, 2, 4, 64, 64)
    prompt, found = Prompt(official["g_c"]), []

    def body(denoiser, _x0):
        fit = FineTune(denoiser, Samples(x0), lambda: prompt, {"a": torch.nn.Parameter(x0[:1])}, FineTuneSettings())
        loss, _ = fit.loss(prompt, x0, official["loss_t"], noise, recon_weight=weight)
        found.append(float(loss))

    with torch.inference_mode():
        Session(toy("tuned 1"), [[official["g_c"][:1].clone(), {}]], torch.zeros(1, 4, 64, 64)).run(body)
    assert abs(found[0] - float(official[name])) < 1e-5
