"""Inversion and null-text optimisation in ComfyUI: the image comes back, and what was stopped goes on."""

from __future__ import annotations

import functools

import pytest
import torch

from .. import tiny_models
from .calm import calm, calmed
from .methods import Setting, run_node
from .test_contract import Cancelled, forget_runs, own_user_folder  # noqa: F401  (a fixture)

STEPS, ITERATIONS = 4, 6


def sigmas(model, steps: int = STEPS, scheduler: str = "ddim_uniform") -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def invert(setting, whole: bool = False, **changes):
    from likeness.nodes.inversion import LikenessInvert

    inputs = {"model": setting.model, "positive": setting.source, "latent": setting.latent, "label": "published"}
    inputs |= {"sigmas": sigmas(setting.model), "check": whole}
    return run_node(LikenessInvert, **{**inputs, **changes})[: 5 if whole else 3]


@functools.cache
def _inverted(family: str, steps: int) -> tuple:
    setting = calmed(family)
    return invert(setting, sigmas=sigmas(setting.model, steps))


def inverted(family: str = "sd1", steps: int = STEPS) -> tuple:
    """A calm network's setting, and what Invert Image gives for it, made once: trajectory, latent, levels."""
    return calmed(family), *_inverted(family, steps)


def play(setting, start, levels, negative, cfg: float) -> torch.Tensor:
    import comfy.samplers

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(setting.model)
        guider.set_conds(setting.source, negative)
        guider.set_cfg(cfg)
        samples = start["samples"]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(torch.zeros_like(samples), samples, sampler, levels, seed=0, disable_pbar=True)


def distance(setting, found) -> float:
    return float((found - setting.latent["samples"]).square().mean().sqrt())


def test_predictions_without_numbers_give_no_result():
    """As a model in fp16 has them that overflows."""
    setting = Setting()
    huge = [[1e25 * setting.source[0][0], setting.source[0][1]]]
    with pytest.raises(RuntimeError, match="came out with NaN or infinite numbers, expected finite ones: load the"):
        invert(setting, positive=huge)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_picture_comes_back_without_guidance_and_the_fixed_point_is_exact(family):
    setting = calm(Setting(family), 0.02)
    errors = {}
    for label in ("published", "current", "fixed point"):
        trajectory, start, levels = invert(setting, label=label, iterations=10)
        assert trajectory.latents.shape == (STEPS + 1, 1, 4, 8, 8) and torch.equal(levels, sigmas(setting.model))
        errors[label] = distance(setting, play(setting, start, levels, setting.empty, 1.0))
    assert errors["fixed point"] < 1e-3 < errors["published"] < 0.2 and errors["current"] < 0.5


def test_batches_odd_sizes_and_the_model_stay_as_they_are():
    setting = calm(Setting(images=3, size=(9, 7)))
    weights = {name: value for name, value in setting.model.model.named_parameters()}
    trajectory, start, _ = invert(setting)
    assert trajectory.latents.shape == (STEPS + 1, 3, 4, 9, 7) and start["samples"].shape == (3, 4, 9, 7)
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())


def optimised(setting, trajectory, **changes):
    from likeness.nodes.inversion import LikenessNullText

    inputs = {"model": setting.model, "positive": setting.source, "negative": setting.empty, "cfg": 7.5}
    inputs |= {"method": "null-text", "start": "empty prompt"}
    return run_node(LikenessNullText, **{**inputs, "trajectory": trajectory, "inner_steps": 5, **changes})


def test_null_text_brings_guided_sampling_back_to_the_picture():
    setting, trajectory, start, levels = inverted()
    plain = distance(setting, play(setting, start, levels, setting.empty, 7.5))
    negative, loss, report, _ = optimised(setting, trajectory, learning_rate=0.1, inner_steps=3)
    assert distance(setting, play(setting, start, levels, negative, 7.5)) < 0.8 * plain
    assert len(negative) == STEPS and len(loss["loss"]) <= 3 * STEPS and f"{len(loss['loss'])} updates in all" in report


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("start", ["prompt", "empty prompt"])
def test_the_optimisation_takes_the_very_steps_of_the_sampler(family, start):
    """With a learning rate that changes nothing, the last loss is what the played image misses: also with SDXL's
    pooled vector, which belongs to the negative prompt's own rows.
    """
    setting, trajectory, noisy, levels = inverted(family, STEPS if family == "sd1" else 2)
    negative, loss, *_ = optimised(setting, trajectory, start=start, inner_steps=1, learning_rate=1e-7)
    found = play(setting, noisy, levels, negative, 7.5)
    missed = (found - setting.latent["samples"]) * setting.model.model.latent_format.scale_factor
    torch.testing.assert_close(float(missed.square().mean()), loss["loss"][-1], atol=0, rtol=1e-2)


def test_from_the_prompt_little_is_left_to_correct():
    setting, trajectory, *_ = inverted()
    first, other = (
        optimised(setting, trajectory, start=start, inner_steps=1)[1]["loss"][0] for start in ("prompt", "empty prompt")
    )
    assert first < 0.5 * other


def test_the_prompt_as_its_own_negative_is_sampling_without_guidance():
    setting, trajectory, start, levels = inverted()
    negative, loss, report, model = optimised(setting, trajectory, method="negative prompt")
    assert model is setting.model and type(loss).__name__ == "ExecutionBlocker" and "no updates" in report
    guided, plain = (play(setting, start, levels, prompt, cfg) for prompt, cfg in ((negative, 7.5), (setting.empty, 1)))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def sampled(model, setting, samples, levels, sampler: str = "euler", positive=None) -> tuple[torch.Tensor, list]:
    """What a stock sampler makes of noisy latents, and its latents before each step."""
    import comfy.samplers

    seen: list = []
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive or setting.source, setting.empty)
        guider.set_cfg(7.5)
        found = guider.sample(
            torch.zeros_like(samples), samples, comfy.samplers.sampler_object(sampler), levels, seed=0,
            callback=lambda *step: seen.append(step[2].clone()), disable_pbar=True,
        )  # fmt: skip
    return found, seen


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_direct_inversion_puts_the_source_back_and_leaves_the_edit_alone(family):
    setting, trajectory, start, levels = inverted(family, STEPS if family == "sd1" else 2)
    negative, loss, _, model = optimised(setting, trajectory, method="direct")
    assert negative is setting.empty and type(loss).__name__ == "ExecutionBlocker"
    both = start["samples"].repeat(2, 1, 1, 1)
    found, seen = sampled(model, setting, both, levels)
    plain, _ = sampled(setting.model, setting, both, levels)
    torch.testing.assert_close(found[:1], setting.latent["samples"], atol=1e-4, rtol=0)
    for step, x in enumerate(seen):
        torch.testing.assert_close(x[:1], trajectory.latents[step], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1:], plain[1:]) and distance(setting, plain[:1]) > 0.1


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "ddim"])
def test_other_samplers_come_back_by_direct_inversion_too(sampler):
    setting, trajectory, start, levels = inverted()
    model = optimised(setting, trajectory, method="direct")[-1]
    found, _ = sampled(model, setting, start["samples"], levels, sampler)
    torch.testing.assert_close(found, setting.latent["samples"], atol=1e-3, rtol=0)


def test_direct_inversion_keeps_what_is_on_the_model_and_never_counts_twice(caplog):
    setting = calm(Setting(images=2))
    trajectory, start, levels = invert(setting)
    before, _ = sampled(setting.model, setting, start["samples"], levels)
    seen = []

    def other(args):
        seen.append(1)
        return args["denoised"]

    setting.model.set_model_sampler_post_cfg_function(other)
    once = optimised(setting, trajectory, method="direct")[-1]
    twice = optimised(setting, trajectory, method="direct", model=once)[-1]
    assert [len(model.model_options["sampler_post_cfg_function"]) for model in (setting.model, once, twice)] == [
        1,
        2,
        2,
    ]
    first, second = (sampled(model, setting, start["samples"], levels)[0] for model in (once, twice))
    assert torch.equal(first, second) and len(seen) == 2 * STEPS
    torch.testing.assert_close(first, setting.latent["samples"], atol=1e-4, rtol=0)
    assert torch.equal(before, sampled(setting.model, setting, start["samples"], levels)[0])
    with pytest.raises(ValueError, match=r"latent to sample is \(1, 4, 8, 8\)"):
        sampled(once, setting, start["samples"][:1], levels)
    assert not caplog.text
    sampled(once, setting, start["samples"], levels[2:])  # a part of the levels is well known
    assert not caplog.text


def test_what_is_optimised_and_inverted_never_sees_the_landing_and_says_so(tmp_path, caplog):
    setting, trajectory, _, levels = inverted(steps=2)
    plain = optimised(setting, trajectory, inner_steps=2)[1]
    forget_runs(tmp_path)
    setting.model = optimised(setting, trajectory, method="direct")[-1]
    assert optimised(setting, trajectory, inner_steps=2)[1] == plain
    assert torch.equal(invert(setting, sigmas=levels)[0].latents, trajectory.latents)
    setting.model.add_wrapper_with_key("calc_cond_batch", "another pack", lambda executor, *args: executor(*args))
    assert optimised(setting, trajectory, inner_steps=1)[1] and "guidance" not in caplog.text
    setting.model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    optimised(setting, trajectory, inner_steps=1, learning_rate=0.03)
    assert "carries guidance (sampler_post_cfg_function), which is left out" in caplog.text


def test_direct_inversion_has_the_last_word_behind_nodes_that_were_connected_later():
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    setting, trajectory, start, levels = inverted()
    model = optimised(setting, trajectory, method="direct")[-1]
    later = run_node(PerturbedAttentionGuidance, model=model, scale=3.0)[0]
    order = list(later.model_options["sampler_post_cfg_function"])
    found, _ = sampled(later, setting, start["samples"], levels)
    torch.testing.assert_close(found, setting.latent["samples"], atol=1e-4, rtol=0)
    assert later.model_options["sampler_post_cfg_function"] == order


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "normal", "karras", "simple", "sgm_uniform", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_every_level_meets_exactly_one_window(scheduler, steps):
    from likeness.core.prompt.windows import windows

    model = calmed().model
    level, levels = model.get_model_object("model_sampling").percent_to_sigma, sigmas(model, steps, scheduler)
    found = windows(levels.tolist(), level)
    edges = [(level(end), level(start)) for start, end in found]
    assert found[0][0] == 0.0 and found[-1][1] == 1.0 and len(found) == len(levels) - 1
    for index, sigma in enumerate(levels[:-1].tolist()):
        assert [i for i, (low, high) in enumerate(edges) if low <= sigma <= high] == [index]
    for index, (above, below) in enumerate(zip(levels[:-2].tolist(), levels[1:-1].tolist(), strict=True)):
        middle = (above * below) ** 0.5  # where dpm_2 evaluates
        assert [i for i, (low, high) in enumerate(edges) if low <= middle <= high] == [index]


def test_more_steps_than_the_published_rate_lasts(monkeypatch):
    """It falls to zero in 100 steps; here in 2."""
    monkeypatch.setattr("likeness.core.inversion.null_text.DECAY", 2.0)
    setting, trajectory, *_ = inverted()
    negative, loss, *_ = optimised(setting, trajectory, inner_steps=1)
    assert len(negative) == STEPS and len(loss["loss"]) == STEPS


def test_null_text_is_served_resumed_and_the_same_again(tmp_path, monkeypatch, caplog):
    """Cancelled in the first step, in the middle of a later one, and at the end of one."""
    from likeness.core.session.progress import Progress

    setting, trajectory, *_ = inverted(steps=2)
    chosen = {"inner_steps": 3, "epsilon": 0.0}
    whole, losses, *_ = optimised(setting, trajectory, **chosen)
    again, same, *_ = optimised(setting, trajectory, **chosen)
    assert losses == same and all(torch.equal(a[0], b[0]) for a, b in zip(whole, again, strict=True))
    update = Progress.update

    def cancel(self, losses, denoised=None):
        if len(losses) == updates and denoised is not None:
            raise Cancelled
        update(self, losses, denoised)

    for updates in (2, 5, 3):
        forget_runs(tmp_path)
        monkeypatch.setattr(Progress, "update", cancel)
        with pytest.raises(Cancelled):
            optimised(setting, trajectory, **chosen)
        seen = []
        monkeypatch.setattr(Progress, "update", lambda self, losses, denoised=None, seen=seen: seen.append(len(losses)))
        resumed, third, *_ = optimised(setting, trajectory, **chosen)
        assert seen[0] == updates + 1 and third == losses and not caplog.text
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, resumed, strict=True))


def test_bad_input_is_refused():
    setting, trajectory, *_ = inverted()
    with pytest.raises(ValueError, match="falling noise levels"):
        invert(setting, sigmas=sigmas(setting.model).flip(0))
    with pytest.raises(ValueError, match="another prompt"):
        optimised(setting, trajectory, positive=setting.target)
    with pytest.raises(ValueError, match="connect the model"):
        optimised(Setting("sdxl"), trajectory)
    with pytest.raises(ValueError, match="With cfg 1 the negative prompt is unused"):
        optimised(setting, trajectory, cfg=1.0)
    for method in ("direct", "negative prompt"):
        with pytest.raises(ValueError, match="another prompt"):
            optimised(setting, trajectory, positive=setting.target, method=method)
    several = Setting(images=2)
    with pytest.raises(ValueError, match="one image at a time"):
        optimised(several, invert(several)[0])
    with pytest.raises(ValueError, match="where an image is still noisy"):
        invert(setting, sigmas=sigmas(setting.model)[:3])


def with_lora(setting) -> None:
    setting.model = setting.model.clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    ones = torch.ones(setting.model.model.state_dict()[key].shape)
    setting.model.add_patches({key: ("diff", (ones,))}, 0.1)


@pytest.mark.parametrize("method", ["null-text", "negative prompt", "direct"])
def test_a_trajectory_of_other_weights_is_refused(method):
    _, trajectory, *_ = inverted()
    with pytest.raises(ValueError, match="made with another model"):
        optimised(calm(Setting(model_seed=1)), trajectory, method=method)
    tuned = calm(Setting())
    with_lora(tuned)
    with pytest.raises(ValueError, match="made with another model"):
        optimised(tuned, trajectory, method=method)
    with_it, *_ = invert(tuned)
    assert optimised(tuned, with_it, method=method, inner_steps=1)


def test_options_that_cannot_be_told_apart_do_not_make_another_prompt():
    import numpy as np

    setting = calm(Setting())
    setting.source[0][1] |= {"note": np.float32(1.0), "thing": object()}
    trajectory, *_ = invert(setting)
    assert optimised(setting, trajectory, method="negative prompt")


def flow_setting(name: str) -> Setting:
    """A flow model of its own layout, and a UNet that samples as one."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    setting = calmed("flux" if name == "flux" else "sd1")
    if name == "sd1 as flow":
        setting.model = run_node(ModelSamplingSD3, model=setting.model, shift=3.0)[0]
    return setting


@functools.cache
def exact_flow(name: str) -> tuple:
    """Such a model's setting, and its image exactly inverted: all outputs of Invert Image."""
    setting = flow_setting(name)
    levels = sigmas(setting.model, STEPS, "simple")
    return setting, *invert(setting, True, label="fixed point", iterations=ITERATIONS, sigmas=levels)


def from_noise(setting, model, latent, noise, levels, negative, cfg: float, count: int = 1) -> torch.Tensor:
    """What SamplerCustomAdvanced makes of the outputs of Invert Image."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(setting.source, negative)
    guider.set_cfg(cfg)
    euler = comfy.samplers.sampler_object("euler")
    latent = {"samples": latent["samples"].clone()}
    return run_node(
        SamplerCustomAdvanced, noise=noise, guider=guider, sampler=euler, sigmas=levels, latent_image=latent
    )[0]["samples"]


@pytest.mark.parametrize("name", ["flux", "sd1 as flow", "sd1"])
def test_noise_and_latent_together_bring_the_image_back_on_every_kind_of_model(name):
    """Also along a part of the levels, where a flow model's latent is neither pure noise nor none."""
    setting = calm(Setting(), 0.02) if name == "sd1" else flow_setting(name)
    scheduler = "ddim_uniform" if name == "sd1" else "simple"
    for skipped, labels in ((0, ("published", "current", "midpoint", "fixed point")), (2, ("midpoint", "fixed point"))):
        levels = sigmas(setting.model, STEPS, scheduler)[skipped:]
        for label in labels if name != "sd1 as flow" else ("published", "fixed point"):
            bound = 1e-4 if label == "fixed point" else 0.1
            outputs = invert(setting, True, label=label, iterations=ITERATIONS, sigmas=levels)
            trajectory, latent, _, noise, report = outputs
            found = from_noise(setting, setting.model, latent, noise, levels, setting.empty, 1.0)
            missed = float((found - setting.latent["samples"]).norm() / setting.latent["samples"].norm())
            assert missed < bound, label
            assert missed == pytest.approx(trajectory.error, rel=2e-2, abs=1e-6) and "is missed by" in report


@pytest.mark.parametrize("name", ["flux", "sd1 as flow"])
@pytest.mark.parametrize("method", ["null-text", "negative prompt", "direct"])
def test_guided_flow_models_come_back(name, method, own_folders):
    setting, trajectory, latent, levels, noise, _ = exact_flow(name)
    chosen = {"start": "prompt", "epsilon": 0.0, "inner_steps": 2}
    negative, _, _, model = optimised(setting, trajectory, method=method, **chosen)
    found = from_noise(setting, model, latent, noise, levels, negative, 4.0)
    torch.testing.assert_close(found, setting.latent["samples"], atol=1e-5, rtol=0)


def test_noise_for_another_size_is_refused():
    setting = flow_setting("flux")
    noise = invert(setting, True, sigmas=sigmas(setting.model, 3, "simple"))[3]
    with pytest.raises(ValueError, match=r"latent to sample is \(1, 16, 4, 4\), the inverted noise \(1, 16, 8, 8\)"):
        noise.generate_noise({"samples": torch.zeros(1, 16, 4, 4)})


def test_without_the_check_nothing_is_measured():
    setting = calmed()
    assert "missed" not in invert(setting, True, check=False)[4]
