"""Reference-guided sampling in ComfyUI: guided where the mask is, played again by the stock sampler, resumed exactly."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models
from .methods import Setting, run_node
from .test_contract import Cancelled, forget_runs, own_user_folder, stored  # noqa: F401  (a fixture)
from .test_inversion import calm, invert, sigmas

STEPS = 10
INSIDE = (slice(None), slice(None), slice(2, 6), slice(2, 6))


def noise(seed: int = 3):
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    return Noise_RandomNoise(seed)


def picture_mask(setting: Setting) -> torch.Tensor:
    mask = torch.zeros(1, 8 * setting.size[0], 8 * setting.size[1])
    mask[:, 16:48, 16:48] = 1
    return mask


def guide(setting: Setting, trajectory, **changes) -> tuple:
    from likeness.nodes.reference import LikenessReferenceGuide

    inputs = {
        "model": setting.model, "positive": setting.target, "negative": setting.empty, "noise": noise(),
        "trajectory": trajectory, "mask": picture_mask(setting), "cfg": 7.5, "inner_steps": 3,
        "start_percent": 0.21, "end_percent": 0.82, "learning_rate": 0.1,
    }  # fmt: skip
    return run_node(LikenessReferenceGuide, **{**inputs, **changes})


def play(model, positive, negative, levels, *, size=(8, 8), cfg: float = 7.5, sampler: str = "euler", batch: int = 1):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = {"samples": torch.zeros(batch, 4, *size)}
    return run_node(
        SamplerCustomAdvanced, noise=noise(), guider=guider, sampler=comfy.samplers.sampler_object(sampler),
        sigmas=levels, latent_image=latent,
    )[0]["samples"]  # fmt: skip


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_stock_sampler_makes_the_same_picture_again(family):
    setting = calm(Setting(family))
    trajectory, _, levels = invert(setting)
    latent, model, negative, loss, report = guide(setting, trajectory)
    again = play(model, setting.target, negative, levels)
    torch.testing.assert_close(again, latent["samples"], atol=1e-4, rtol=0)
    assert len(loss["loss"]) == 3 * 6 and "steps 3 to 8 of 10, 3 updates in each" in report
    plain = play(setting.model, setting.target, setting.empty, levels)
    assert float((latent["samples"] - plain).abs().max()) > 1e-2
