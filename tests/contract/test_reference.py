"""Reference-guided sampling in ComfyUI: guided where the mask is, played again by the stock sampler, resumed."""

from __future__ import annotations

import pytest
import torch

from likeness.core.session.session import Session

from .. import tiny_models
from .calm import calm, calmed
from .methods import Setting, run_node
from .test_contract import Cancelled, forget_runs, own_user_folder  # noqa: F401  (a fixture)
from .test_inversion import STEPS, invert, inverted, sigmas

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
        "trajectory": trajectory, "mask": picture_mask(setting), "cfg": 7.5, "inner_steps": 2,
        "start_percent": 0.3, "end_percent": 0.8, "learning_rate": 0.1,
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
    setting, trajectory, _, levels = inverted(family)
    latent, model, negative, loss, report = guide(setting, trajectory)
    again = play(model, setting.target, negative, levels)
    torch.testing.assert_close(again, latent["samples"], atol=1e-4, rtol=0)
    assert len(loss["loss"]) == 2 * 2 and "steps 2 to 3 of 4, 2 updates in each" in report
    plain = play(setting.model, setting.target, setting.empty, levels)
    assert float((latent["samples"] - plain).abs().max()) > 1e-2


def test_with_a_step_wise_embedding_and_a_fine_tuned_model_it_is_played_again_too():
    from likeness.core.prompt.conditioning import apply_embedding
    from likeness.core.prompt.windows import windows

    setting = calm(Setting())
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    tuned = setting.model.clone()
    tuned.add_patches({key: ("diff", (torch.ones(setting.model.model.state_dict()[key].shape),))}, 0.05)
    setting.model = tuned
    trajectory, _, levels = invert(setting)
    sampling = tuned.get_model_object("model_sampling")
    rows = torch.randn(STEPS, 5, 768, generator=torch.Generator().manual_seed(8))
    positive = apply_embedding(setting.target, rows, 1.0, windows(levels.tolist(), sampling.percent_to_sigma))
    latent, model, negative, *_ = guide(setting, trajectory, positive=positive)
    torch.testing.assert_close(play(model, positive, negative, levels), latent["samples"], atol=1e-4, rtol=0)
    plain = guide(setting, trajectory)[0]["samples"]
    assert float((latent["samples"] - plain).abs().max()) > 1e-2


def test_without_updates_it_is_plain_sampling_with_one_transplant():
    """The stock way: the first steps, a composite of noisy latents, the other steps without noise."""
    import comfy.samplers

    setting, trajectory, _, levels = inverted()
    latent, model, negative, loss, _ = guide(setting, trajectory, inner_steps=0, start_percent=0.6)

    def part(start, drawn, of_levels):
        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(setting.model)
            guider.set_conds(setting.target, setting.empty)
            guider.set_cfg(7.5)
            sampler = comfy.samplers.sampler_object("euler")
            return guider.sample(drawn, start, sampler, of_levels, disable_pbar=True, seed=0)

    zeros = torch.zeros(1, 4, 8, 8)
    middle = part(zeros, noise().generate_noise({"samples": zeros}), levels[:3])
    transplanted = trajectory.latents[2] / setting.model.model.latent_format.scale_factor
    middle = middle.clone()
    middle[INSIDE] = transplanted[INSIDE]
    expected = part(middle, zeros, levels[2:])
    torch.testing.assert_close(latent["samples"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(play(model, setting.target, negative, levels), expected, atol=1e-4, rtol=0)
    assert len(negative) == 1 and type(loss).__name__ == "ExecutionBlocker"


def test_the_subject_comes_nearer_to_the_reference_inside_the_mask():
    setting, trajectory, *_ = inverted()
    reference = setting.latent["samples"]

    def apart(**changes) -> float:
        found = guide(setting, trajectory, **changes)[0]["samples"]
        return float((found - reference)[INSIDE].square().mean())

    assert apart(inner_steps=3) < apart(inner_steps=1) < apart(inner_steps=0)


def test_every_step_has_one_negative_for_every_cell():
    setting = calm(Setting(size=(9, 7)))
    trajectory, _, levels = invert(setting)
    latent, model, negative, *_ = guide(setting, trajectory)
    assert latent["samples"].shape == (1, 4, 9, 7)
    again = play(model, setting.target, negative, levels, size=(9, 7))
    torch.testing.assert_close(again, latent["samples"], atol=1e-4, rtol=0)
    sampling = setting.model.get_model_object("model_sampling")
    for sigma in levels[:-1].tolist():
        covered = torch.zeros(1, 9, 7)
        for _, options in negative:
            start, end = (sampling.percent_to_sigma(options[name]) for name in ("start_percent", "end_percent"))
            if end <= sigma <= start:
                covered += options.get("mask", torch.ones(1, 9, 7))
        assert torch.equal(covered, torch.ones(1, 9, 7))


@pytest.mark.parametrize(("steps", "scheduler", "window"), [
    (50, "ddim_uniform", range(10, 41)), (25, "ddim_uniform", range(5, 20)), (50, "normal", range(11, 41)),
])  # fmt: skip
def test_the_published_window(steps, scheduler, window):
    from likeness.core.reference.guidance import END_PERCENT, START_PERCENT
    from likeness.core.reference.host.guidance import guided_steps

    model = tiny_models.sd1()
    found = guided_steps(
        sigmas(model, steps, scheduler).tolist(), START_PERCENT, END_PERCENT,
        model.get_model_object("model_sampling").percent_to_sigma,
    )  # fmt: skip
    assert found == window


def test_the_model_stays_as_it_is_and_the_result_is_the_same_again(tmp_path):
    setting, trajectory, *_ = inverted()
    before = play(setting.model, setting.target, setting.empty, sigmas(setting.model))
    weights = {name: value for name, value in setting.model.model.named_parameters()}
    options, state = repr(setting.model.model_options), torch.get_rng_state()
    first = guide(setting, trajectory)[0]["samples"]
    forget_runs(tmp_path)
    assert torch.equal(guide(setting, trajectory)[0]["samples"], first)
    assert torch.equal(before, play(setting.model, setting.target, setting.empty, sigmas(setting.model)))
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())
    assert repr(setting.model.model_options) == options and torch.equal(state, torch.get_rng_state())
    assert not setting.model.wrappers.get("outer_sample")


def test_cancelled_resumed_and_served(tmp_path, monkeypatch):
    from likeness.core.session.progress import Progress
    from likeness.core.session.session import GuiderDenoiser

    setting, trajectory, *_ = inverted()
    chosen = {"inner_steps": 3}
    whole, _, negative, losses, _ = guide(setting, trajectory, **chosen)
    forget_runs(tmp_path)
    update, seen = Progress.update, []

    def cancel(self, losses, denoised=None):
        if len(losses) == 5 and denoised is not None:
            raise Cancelled
        update(self, losses, denoised)

    monkeypatch.setattr(Progress, "update", cancel)
    with pytest.raises(Cancelled):
        guide(setting, trajectory, **chosen)
    monkeypatch.setattr(Progress, "update", lambda self, losses, denoised=None: seen.append(len(losses)))
    resumed, _, again, same, _ = guide(setting, trajectory, **chosen)
    assert seen[0] == 6 and same == losses and torch.equal(resumed["samples"], whole["samples"])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(negative, again, strict=True))
    monkeypatch.setattr(GuiderDenoiser, "denoised", None)  # what is stored needs no model
    served, *_ = guide(setting, trajectory, **chosen)
    assert torch.equal(served["samples"], whole["samples"])


def test_whatever_decides_the_picture_makes_another_run(monkeypatch):
    from likeness.core.reference.host import guidance

    def asked(job):
        raise Cancelled(job.key())

    monkeypatch.setattr(guidance, "run", asked)
    setting, trajectory, *_ = inverted()
    other = picture_mask(setting).roll(8, 1)
    changes = [
        {}, {"noise": noise(4)}, {"mask": other}, {"cfg": 5.0}, {"positive": setting.source},
        {"negative": setting.source}, {"end_percent": 0.7}, {"trajectory": invert(setting, label="current")[0]},
    ]  # fmt: skip
    keys = set()
    for change in [*changes, {}]:
        with pytest.raises(Cancelled) as found:
            guide(setting, **{"trajectory": trajectory, "inner_steps": 1, **change})
        keys |= set(found.value.args)
    assert len(keys) == len(changes)


def test_bad_input_is_refused_before_any_work(monkeypatch):
    setting, trajectory, *_ = inverted()
    two, xl = invert(Setting(images=2))[0], calmed("sdxl")

    monkeypatch.setattr(Session, "run", None)
    mask, target = picture_mask(setting), setting.target
    area = [[target[0][0], {**target[0][1], "area": (4, 4, 0, 0)}]]
    late = [[target[0][0], {**target[0][1], "start_percent": 0.5}]]
    pooled = [
        [
            target[0][0],
            {"pooled_output": torch.full((1, 768), value), "start_percent": value, "end_percent": value + 0.5},
        ]
        for value in (0.0, 0.5)
    ]
    for message, changes in {
        "mask is empty": {"mask": torch.zeros_like(mask)},
        "covers the whole image": {"mask": torch.ones_like(mask)},
        "2 masks came with 1 images": {"mask": mask.repeat(2, 1, 1)},
        "another proportion": {"mask": torch.ones(1, 64, 128)},
        "holds 2 images": {"trajectory": two},
        "another model family": {"model": xl.model},
        "begin at the very first step": {"start_percent": 0.0},
        "None of the 4 sampling steps": {"start_percent": 0.5, "end_percent": 0.51},
        "give a start below the end": {"start_percent": 0.5, "end_percent": 0.5},
        "limited by area": {"positive": area},
        "has 2 entries in step 1 of 4": {"positive": [*target, *setting.source]},
        "has 0 entries in step 1 of 4": {"positive": late},
        "differ in more than their rows": {"positive": pooled},
        "With cfg 1 no negative prompt": {"cfg": 1.0},
        "negative prompt has 2 prompts": {"negative": [*setting.empty, *setting.source]},
    }.items():
        with pytest.raises(ValueError, match=message):
            guide(setting, **{"trajectory": trajectory, **changes})


def test_the_guided_model_is_for_its_own_size_and_levels(caplog):
    setting, trajectory, _, levels = inverted()
    _, model, negative, *_ = guide(setting, trajectory)
    with pytest.raises(ValueError, match=r"The latent to sample is \(1, 4, 16, 8\)"):
        play(model, setting.target, negative, levels, size=(16, 8))
    assert "noise levels that the inversion did not have" not in caplog.text
    play(model, setting.target, negative, levels, batch=2)
    assert "noise levels that the inversion did not have" not in caplog.text
    play(model, setting.target, negative, sigmas(model, 7, "karras"))
    assert "noise levels that the inversion did not have" in caplog.text


def test_a_thin_subject_is_not_lost():
    from likeness.core.reference.host.guidance import subject_cells

    thin = torch.zeros(1, 64, 64)
    thin[:, :, 20:22] = 1
    assert subject_cells(thin, torch.zeros(3, 1, 4, 8, 8)).sum() == 8
