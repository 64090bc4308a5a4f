"""What lives in the steps of a sampling does not reach a training; patches that keep a state keep the key of a run."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from likeness.core.session.fingerprint import patches_digest

from .methods import METHODS, Setting, run_node, sample
from .setting import levels

WHOLE = {"reuse_threshold": 0.9, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
METHOD = {method.name: method for method in METHODS}


def easy_cache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode

    return run_node(EasyCacheNode, model=model, reuse_threshold=0.9, start_percent=0.0, end_percent=1.0, verbose=False)[
        0
    ]


def lazy_cache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode

    return run_node(LazyCacheNode, model=model, reuse_threshold=0.9, start_percent=0.0, end_percent=1.0, verbose=False)[
        0
    ]


def tea_cache(model):
    """As packs with step caches of their own do it: the last result again while the input changes little."""
    clone, last = model.clone(), {}

    def cached(apply, arguments):
        if "x" in last and float((arguments["input"] - last["x"]).abs().mean()) < 1.0:
            return last["result"]
        last["x"] = arguments["input"].detach()
        result = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        last["result"] = result.detach()
        return result

    clone.set_model_unet_function_wrapper(cached)
    return clone


def tome(model, ratio: float = 0.3):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return run_node(TomePatchModel, model=model, ratio=ratio)[0]


def sag(model, scale: float = 0.5):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return run_node(SelfAttentionGuidance, model=model, scale=scale, blur_sigma=2.0)[0]


def inverted(setting: Setting, model) -> torch.Tensor:
    from likeness.nodes.inversion import LikenessInvert

    inputs = {"positive": setting.source, "sigmas": levels(setting, 10), "label": "published", "latent": setting.latent}
    return run_node(LikenessInvert, model=model, **inputs, iterations=1)[0].latents


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("cache", [easy_cache, lazy_cache])
@pytest.mark.parametrize("name", ["hiper", "sine", "siso"])
def test_caches_of_steps_are_left_out_of_a_training(caplog, tmp_path, cache, name):
    method, setting = METHOD[name], Setting()
    plain = method.tensors(method.fit(setting)[0])
    shutil.rmtree(tmp_path / "user")  # the run would be served
    setting.model = cache(setting.model)
    with caplog.at_level(logging.INFO):
        cached = method.tensors(method.fit(setting)[0])
    assert "cache, which belongs to sampling steps" in caplog.text, "it was trained"
    assert all(torch.equal(value, cached[part]) for part, value in plain.items())
    assert patches_digest(setting.model) == patches_digest(Setting().model), "a run is found again without the cache"


@pytest.mark.parametrize("cache", [easy_cache, lazy_cache])
def test_an_inversion_calls_the_model_in_every_step(cache):
    setting = Setting()
    assert torch.equal(inverted(setting, setting.model), inverted(setting, cache(setting.model)))


@pytest.mark.usefixtures("own_folders")
def test_it_is_said_what_was_left_out(caplog):
    setting = Setting()
    setting.model = easy_cache(setting.model)
    with caplog.at_level(logging.INFO, "likeness"):
        METHOD["hiper"].fit(setting)
    assert "easycache, which belongs to sampling steps" in caplog.text


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "sine"])
def test_another_packs_cache_is_refused_before_work(name):
    setting = Setting()
    setting.model = tea_cache(setting.model)
    with pytest.raises(RuntimeError, match="uses an earlier step again .*: connect the model before that node"):
        METHOD[name].fit(setting)


@pytest.mark.parametrize(("patch", "value"), [(tome, 0.5), (sag, 1.0)])
def test_a_patch_that_keeps_a_state_keeps_the_key(patch, value):
    setting = Setting(size=(16, 16))
    patched = patch(setting.model)
    before = patches_digest(patched)
    sample(patched, setting.source, setting.empty, setting.latent)
    assert patches_digest(patched) == before == patches_digest(patch(setting.model))
    assert patches_digest(patch(setting.model, value)) != before != patches_digest(setting.model)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("patch", [tome, sag])
def test_a_run_with_such_a_patch_is_served(patch, monkeypatch):
    method, setting = METHOD["hiper"], Setting(size=(16, 16))
    setting.model = patch(setting.model)
    first = method.tensors(method.fit(setting)[0])
    sample(setting.model, setting.source, setting.empty, setting.latent)
    monkeypatch.setattr("likeness.core.session.session.Session.run", lambda *_: pytest.fail("it was trained again"))
    again = method.tensors(method.fit(setting)[0])
    assert all(torch.equal(value, again[part]) for part, value in first.items())


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "sine", "siso", "null-text", "reference"])
def test_what_a_patch_draws_does_not_depend_on_what_ran_before(tmp_path, name):
    """ToMe draws from torch's own random numbers, in each call of the model."""
    method, setting = METHOD[name], Setting(size=(16, 16))
    setting.model = tome(setting.model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = method.tensors(method.fit(setting, steps=3)[0])
    assert torch.equal(state, torch.get_rng_state())
    shutil.rmtree(tmp_path / "user")
    method.fit(setting, steps=2)
    torch.manual_seed(2)
    again = method.tensors(method.fit(setting, steps=3)[0])
    assert all(torch.equal(value, again[part]) for part, value in first.items())


def test_what_a_patch_draws_in_an_inversion_is_the_same_each_time():
    setting = Setting(size=(16, 16))
    patched = tome(setting.model)
    assert torch.equal(inverted(setting, patched), inverted(setting, patched))
    assert not torch.equal(inverted(setting, patched), inverted(setting, setting.model))
