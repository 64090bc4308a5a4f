"""Step-wise embeddings in ComfyUI: every denoising step gets its own rows, and what does not fit is refused."""

from __future__ import annotations

import functools

import pytest
import torch

from likeness.core.session.session import Session

from .. import tiny_models
from .methods import run_node
from .setting import SharedSetting as Setting
from .test_contract import own_user_folder  # noqa: F401  (a fixture)

STEPS = 4


def sigmas(setting: Setting, steps: int = STEPS, scheduler: str = "ddim_uniform") -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(setting.model.get_model_object("model_sampling"), scheduler, steps)


def trained(setting: Setting, tokens: int = 4, **changes):
    """An embedding of eq. 6, of two updates."""
    from likeness.nodes.embedding import LikenessTrainEmbedding

    inputs = {
        "model": setting.model,
        "positive": setting.source,
        "steps": 2,
        "learning_rate": 0.02,
        "tokens": tokens,
        "save_every": 1,
        "init": "empty prompt",
        "seed": 0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "preview_steps": 0,
        "preview_cfg": 1.0,
        "latent": setting.latent,
        "negative": setting.empty,
    }
    return run_node(LikenessTrainEmbedding, **{**inputs, **changes})[0]


def refined(setting: Setting, embedding, **changes):
    from likeness.nodes.embedding import LikenessRefineEmbedding

    inputs = {
        "model": setting.model,
        "positive": setting.source,
        "embedding": embedding,
        "sigmas": sigmas(setting),
        "inner_steps": 2,
        "learning_rate": 0.05,
        "step": 0,
        "seed": 0,
        "latent": setting.latent,
    }
    return run_node(LikenessRefineEmbedding, **{**inputs, **changes})


@functools.cache
def learned(family: str = "sd1") -> tuple:
    """A setting, its embedding of eq. 6, and the step-wise one with its losses, made once."""
    setting = Setting(family)
    first = trained(setting)
    return setting, first, *refined(setting, first)


def applied(setting: Setting, embedding, conditioning=None, scale: float = 1.0):
    from likeness.nodes.embedding import LikenessApplyEmbedding

    inputs = {"conditioning": conditioning or setting.target, "embedding": embedding, "scale": scale, "step": 0}
    return run_node(LikenessApplyEmbedding, **inputs)[0]


def asked(setting: Setting, positive, levels: torch.Tensor, sampler: str = "euler") -> list[tuple[float, torch.Tensor]]:
    """(noise level, last rows of the prompt) of every call that a stock sampling makes of the model."""
    import comfy.samplers

    calls = []
    model = setting.model.clone()

    def note(apply_model, args):
        calls.append((float(args["timestep"][0]), args["c"]["c_crossattn"][0, -4:].clone()))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(note)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, setting.empty)
        guider.set_cfg(1.0)
        samples = setting.latent["samples"]
        noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
        chosen = comfy.samplers.sampler_object(sampler)
        guider.sample(noise, samples, chosen, levels, seed=0, disable_pbar=True)
    return calls


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_step_of_the_sampling_gets_its_own_rows(family):
    setting, _, embedding, loss = learned(family)
    assert embedding.at(0).shape[:2] == (STEPS, 4) and len(loss["loss"]) == STEPS * 2
    assert list(embedding.rows) == [2] and embedding.header["method"] == "hifi tuner, step-wise"
    calls = asked(setting, applied(setting, embedding), sigmas(setting))
    assert len(calls) == STEPS
    for (_, rows), expected in zip(calls, embedding.at(0), strict=True):
        torch.testing.assert_close(rows.float(), expected, atol=1e-6, rtol=0)
    assert len({float(rows.sum()) for _, rows in calls}) == STEPS


@pytest.mark.parametrize(("sampler", "scheduler"), [("heun", "normal"), ("dpmpp_2m", "karras"), ("dpm_2", "simple")])
def test_other_samplers_and_schedules_take_the_rows_of_the_nearest_step(sampler, scheduler):
    setting, _, embedding, _ = learned()
    calls = asked(setting, applied(setting, embedding), sigmas(setting, 7, scheduler), sampler)
    assert len(calls) >= 7
    level = setting.model.get_model_object("model_sampling").percent_to_sigma
    for sigma, rows in calls:
        found = int((embedding.at(0) - rows).abs().amax((1, 2)).argmin())
        torch.testing.assert_close(rows.float(), embedding.at(0)[found], atol=1e-6, rtol=0)
        held = [i for i, (a, b) in enumerate(embedding.windows) if level(b) <= sigma <= level(a)]
        assert held == [found], sigma


def test_scale_zero_is_the_prompt_and_windows_meet_the_prompts_own():
    from nodes import ConditioningSetTimestepRange

    setting, _, embedding, _ = learned()
    ((text, options),) = applied(setting, embedding, scale=0.0)
    assert torch.equal(text, setting.target[0][0]) and "start_percent" not in options
    late = run_node(ConditioningSetTimestepRange, conditioning=setting.target, start=0.5, end=1.0)[0]
    entries = applied(setting, embedding, conditioning=late)
    assert 0 < len(entries) < STEPS
    assert entries[0][1]["start_percent"] == 0.5 and entries[-1][1]["end_percent"] == 1.0


def test_saved_and_loaded_it_keeps_its_windows(tmp_path):
    from likeness.core.embedding.artifact import load_embedding, save_embedding

    setting, _, embedding, _ = learned()
    save_embedding(tmp_path / "subject.safetensors", embedding)
    loaded = load_embedding(tmp_path / "subject.safetensors")
    assert loaded.windows == embedding.windows and "4 denoising steps" in loaded.describe()
    one, other = applied(setting, embedding), applied(setting, loaded)
    assert all(torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() for a, b in zip(one, other, strict=True))


def test_the_anchor_holds_the_rows_to_the_empty_prompt():
    def distance(weight: float, anchor: str, step_wise: bool) -> float:
        setting = learned()[0]
        more = {"anchor_weight": weight, "anchor": anchor, "negative": setting.empty}
        if step_wise:
            embedding, _ = refined(setting, learned()[1], sigmas=sigmas(setting, 2), inner_steps=6, **more)
        else:
            embedding = trained(setting, steps=8, **more, learning_rate=0.05)
        return float((embedding.at(0) - setting.empty[0][0][0, -4:]).norm())

    for step_wise in (False, True):
        free = distance(0.0, "in the loss", step_wise)
        held = [distance(1.0, anchor, step_wise) for anchor in ("in the loss", "decoupled")]
        assert max(held) < 0.9 * free and held[0] != held[1]


REFUSED = {
    "flipped sigmas": ({"sigmas": torch.tensor([0.0, 1.0, 5.0])}, "do not flip or cut"),
    "anchor without an empty prompt": ({"anchor_weight": 0.1}, "connect the empty prompt"),
    "a step that was not saved": ({"step": 7}, "was not saved"),
    "another family's prompt": ({"positive": tiny_models.prompt("sdxl", 1)}, "has width 768, the prompt 2048|width"),
    "no image": ({"latent": None}, "Connect either a LATENT, or an IMAGE"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_work_starts(case, monkeypatch):
    setting, embedding, *_ = learned()
    monkeypatch.setattr(Session, "run", None)
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        refined(setting, embedding, **changes)


def test_a_step_wise_embedding_or_another_model_is_refused():
    setting, _, embedding, _ = learned()
    with pytest.raises(ValueError, match="4 denoising steps already"):
        refined(setting, embedding)
    with pytest.raises(ValueError, match="their family differ"):
        refined(Setting("sdxl"), embedding)
