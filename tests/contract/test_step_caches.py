"""What lives in the steps of a sampling does not reach a training; patches that keep a state keep the key of a run."""

from __future__ import annotations

import functools
import logging
import shutil

import pytest
import torch

from likeness.core.session.fingerprint import patches_digest

from . import methods
from .methods import METHODS, run_node, sample
from .setting import Setting as NewSetting
from .setting import SharedSetting as Setting
from .setting import levels

WHOLE = {"reuse_threshold": 0.9, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
METHOD = {method.name: method for method in METHODS}
STEPS = 2


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


def first_block_cache(model):
    """As others do it: the network's own method is replaced, for this model."""
    clone, last = model.clone(), {}
    forward = clone.model.diffusion_model.forward

    def cached(x, *more, **named):
        if "x" not in last or float((x - last["x"]).abs().mean()) >= 1.0:
            last["x"], last["result"] = x.detach(), forward(x, *more, **named).detach()
        return last["result"]

    clone.add_object_patch("diffusion_model.forward", cached)
    return clone


def wrapped_cache(model):
    """And others: a wrapper in the transformer options, which ComfyUI's networks call."""
    import comfy.patcher_extension as patcher_extension

    clone, last = model.clone(), {}

    def cached(executor, x, *more, **named):
        if "x" not in last or float((x - last["x"]).abs().mean()) >= 1.0:
            last["x"], last["result"] = x.detach(), executor(x, *more, **named).detach()
        return last["result"]

    options = clone.model_options.setdefault("transformer_options", {})
    kind = patcher_extension.WrappersMP.DIFFUSION_MODEL
    patcher_extension.add_wrapper_with_key(kind, "tea", cached, options)
    return clone


def counting_cache(model, interval: int = 3):
    """And others: each third step is computed, whatever it is like."""
    clone, state = model.clone(), {"count": 0}

    def cached(apply, arguments):
        if state["count"] % interval == 0:
            state["result"] = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        state["count"] += 1
        return state["result"]

    clone.set_model_unet_function_wrapper(cached)
    return clone


def hyper_tile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    found = HyperTile.execute(model=model, tile_size=1, swap_size=2, max_depth=0, scale_depth=False)
    return getattr(found, "args", found)[0]  # 0.3.75 has it without


def windows(model):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    values = {"context_length": 4, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1}
    widgets = ContextWindowsManualNode.define_schema().inputs  # newer ComfyUI's has more of them
    others = {widget.id: widget.default for widget in widgets if getattr(widget, "default", None) is not None}
    return run_node(ContextWindowsManualNode, **others | values | {"model": model, "fuse_method": "pyramid", "dim": 2})[
        0
    ]


def compiled(model):
    """By core's own function, with the backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


def compiled_blocks(model):
    """As other packs do it: compiled modules in the place of the network's own."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model.out", torch.compile(model.model.diffusion_model.out, backend="eager"))
    return clone


def tome(model, ratio: float = 0.3):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return run_node(TomePatchModel, model=model, ratio=ratio)[0]


def sag(model, scale: float = 0.5):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return run_node(SelfAttentionGuidance, model=model, scale=scale, blur_sigma=2.0)[0]


def inverted(setting: Setting, model) -> torch.Tensor:
    from likeness.nodes.inversion import LikenessInvert

    inputs = {"positive": setting.source, "sigmas": levels(setting, 4), "label": "published", "latent": setting.latent}
    return run_node(LikenessInvert, model=model, **inputs, iterations=1)[0].latents


@functools.cache
def inverted_alone() -> torch.Tensor:
    """By a model without patches."""
    setting = Setting()
    return inverted(setting, setting.model)


@functools.cache
def trained_alone(name: str) -> dict[str, torch.Tensor]:
    """With a model without patches."""
    return METHOD[name].tensors(METHOD[name].fit(Setting(), steps=STEPS)[0])


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("cache", [easy_cache, lazy_cache])
@pytest.mark.parametrize("name", ["hiper", "sine", "siso"])
def test_caches_of_steps_are_left_out_of_a_training(caplog, tmp_path, cache, name):
    method, setting, plain = METHOD[name], Setting(), trained_alone(name)
    shutil.rmtree(tmp_path / "user", ignore_errors=True)  # the run would be served
    setting.model = cache(setting.model)
    with caplog.at_level(logging.INFO):
        cached = method.tensors(method.fit(setting, steps=STEPS)[0])
    said = cache.__name__.replace("_", "")
    assert f"{said}, which belongs to sampling steps" in caplog.text, "it was trained"
    assert all(torch.equal(value, cached[part]) for part, value in plain.items())
    assert patches_digest(setting.model) == patches_digest(Setting().model), "a run is found again without the cache"


@pytest.mark.parametrize("cache", [easy_cache, lazy_cache])
def test_an_inversion_calls_the_model_in_every_step(cache):
    setting = Setting()
    assert torch.equal(inverted_alone(), inverted(setting, cache(setting.model)))


CACHES = [tea_cache, first_block_cache, wrapped_cache, counting_cache]


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["hiper", "sine"])
def test_another_packs_cache_is_refused_before_work(name, cache):
    setting = NewSetting()
    setting.model = cache(setting.model)
    with pytest.raises(RuntimeError, match="uses an earlier step again .*: connect the model before that node"):
        METHOD[name].fit(setting)


def renoised(setting: Setting, model) -> torch.Tensor:
    from likeness.core.inversion.host.renoise import renoise_image
    from likeness.core.inversion.renoise import ReNoiseSettings
    from likeness.core.session.images import ImageSource

    with torch.inference_mode():
        source = ImageSource(setting.latent)
        found = renoise_image(model, setting.source, source, levels(setting, 3, 4), ReNoiseSettings())
    return found.latent["samples"]


@pytest.mark.parametrize("invert", [inverted, renoised])
@pytest.mark.parametrize("cache", CACHES)
def test_another_packs_cache_is_refused_before_an_inversion(cache, invert):
    """It was silently wrong: the steps of a trajectory are like each other."""
    setting = NewSetting()
    with pytest.raises(RuntimeError, match="uses an earlier step again .*: connect the model before that node"):
        invert(setting, cache(setting.model))


def test_a_cache_that_has_just_been_sampled_with_is_noticed_too():
    setting = NewSetting()
    cached = first_block_cache(setting.model)
    sample(cached, setting.source, setting.empty, {"samples": 0 * setting.latent["samples"]})
    with pytest.raises(RuntimeError, match="uses an earlier step again"):
        inverted(setting, cached)


@pytest.mark.parametrize("interval", [2, 3, 4, 5])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_cache_that_counts_steps_is_noticed_wherever_it_stands(interval, before):
    setting = Setting()
    cached = counting_cache(setting.model, interval)
    zeros = {"samples": 0 * setting.latent["samples"]}
    if before:
        sample(cached, setting.source, setting.empty, zeros, steps=before, cfg=1.0)
    with pytest.raises(RuntimeError, match="uses an earlier step again"):
        inverted(setting, cached)


@pytest.mark.parametrize("patch", [tome, sag, hyper_tile])
def test_patches_that_draw_or_keep_something_are_no_caches(patch):
    setting = Setting()
    assert bool(torch.isfinite(inverted(setting, patch(setting.model))).all())


def test_nothing_is_looked_for_behind_the_packs_own_patches():
    """Ten predictions cost as much as five updates; another's patch beside ours is looked at."""
    from likeness.core.session.reuse import may_reuse
    from likeness.core.sine.host.position_map import with_position_map

    model = NewSetting().model
    placed = with_position_map(model, 8, "bilinear")
    assert placed.model_options["transformer_options"]["patches"]
    assert not may_reuse(model) and not may_reuse(placed)
    placed.set_model_attn1_output_patch(lambda n, _options: n)
    assert may_reuse(placed)


@pytest.mark.parametrize("more", [{}, {"all_weights": True}, {"negative": "a prompt"}], ids=repr)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_session_without_patches_begins_with_its_probe_alone(checkpointing, more, monkeypatch):
    """One prediction; what the session itself attaches to the network, as checkpointing does, is no cache."""
    from likeness.core.session.session import Session

    setting, predictions = NewSetting(), []
    model = setting.model.model
    ordinary = model.apply_model

    def noted(*given, **named):
        predictions.append(1)
        return ordinary(*given, **named)

    monkeypatch.setattr(model, "apply_model", noted)
    more = {"negative": setting.empty} if "negative" in more else more
    with torch.inference_mode():
        session = Session(setting.model, setting.source, setting.latent["samples"], checkpointing=checkpointing, **more)
        session.run(lambda *_: None)
    assert len(predictions) == 1


def test_a_patch_of_some_noise_levels_is_no_cache():
    """It calls no layer of a block below the middle one of the levels; and so after any other step."""
    setting = NewSetting()
    model, sampling = setting.model.clone(), setting.model.get_model_object("model_sampling")
    middle = float(sampling.sigmas[len(sampling.sigmas) // 2]) - 1e-6
    forward = model.model.diffusion_model.forward

    def skipping(x, timesteps, **named):
        low = float(sampling.sigma(timesteps.max())) < middle
        return x * 0.5 if low else forward(x, timesteps, **named)

    model.add_object_patch("diffusion_model.forward", skipping)
    assert bool(torch.isfinite(inverted(setting, model)).all())


LEFT_OUT = {
    "context windows": windows,
    "torch.compile": compiled,
    "torch.compile of diffusion_model.out": compiled_blocks,
}


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("said", LEFT_OUT)
@pytest.mark.parametrize("name", ["hiper", "sine", "null-text"])
def test_windows_and_compiled_models_are_left_out_of_a_training(caplog, tmp_path, name, said):
    method, setting, plain = METHOD[name], Setting(), trained_alone(name)
    shutil.rmtree(tmp_path / "user", ignore_errors=True)
    setting.model = LEFT_OUT[said](setting.model)
    with caplog.at_level(logging.INFO, "likeness"):
        left_out = method.tensors(method.fit(setting, steps=STEPS)[0])
    assert f"Left out here: {said}, which belongs to sampling steps" in caplog.text
    assert all(torch.equal(value, left_out[part]) for part, value in plain.items())


@pytest.mark.parametrize("said", LEFT_OUT)
def test_windows_and_compiled_models_are_left_out_of_an_inversion(caplog, said):
    setting = Setting()
    patched = LEFT_OUT[said](setting.model)
    with caplog.at_level(logging.INFO, "likeness"):
        assert torch.equal(inverted_alone(), inverted(setting, patched))
    assert f"Left out here: {said}, which belongs to sampling steps" in caplog.text


@pytest.mark.parametrize("patch", [compiled, compiled_blocks])
def test_a_run_is_found_again_with_a_compiled_model(patch):
    assert patches_digest(patch(Setting().model)) == patches_digest(Setting().model)


@pytest.mark.parametrize(("patch", "value"), [(tome, 0.5), (sag, 1.0)])
def test_a_patch_that_keeps_a_state_keeps_the_key(patch, value):
    setting = Setting()
    patched = patch(setting.model)
    before = patches_digest(patched)
    sample(patched, setting.source, setting.empty, setting.latent)
    assert patches_digest(patched) == before == patches_digest(patch(setting.model))
    assert patches_digest(patch(setting.model, value)) != before != patches_digest(setting.model)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("patch", [tome, sag])
def test_a_run_with_such_a_patch_is_served(patch, monkeypatch):
    method, setting = METHOD["hiper"], Setting()
    setting.model = patch(setting.model)
    first = method.tensors(method.fit(setting, steps=1)[0])
    sample(setting.model, setting.source, setting.empty, setting.latent)
    monkeypatch.setattr("likeness.core.session.session.Session.run", lambda *_: pytest.fail("it was trained again"))
    again = method.tensors(method.fit(setting, steps=1)[0])
    assert all(torch.equal(value, again[part]) for part, value in first.items())


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "sine", "siso", "null-text", "reference"])
def test_what_a_patch_draws_does_not_depend_on_what_ran_before(tmp_path, monkeypatch, name):
    """ToMe draws from torch's own random numbers, in each call of the model; also in an inversion, which has its own
    test below.
    """
    method, setting, kept, invert = METHOD[name], Setting(), {}, methods._trajectory

    def trajectory(setting: Setting, steps: int):
        kept[steps] = kept.get(steps) or invert(setting, steps)
        return kept[steps]

    monkeypatch.setattr(methods, "_trajectory", trajectory)
    setting.model = tome(setting.model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = method.tensors(method.fit(setting, steps=2)[0])
    assert torch.equal(state, torch.get_rng_state())
    shutil.rmtree(tmp_path / "user")
    method.fit(setting, steps=1)
    torch.manual_seed(2)
    again = method.tensors(method.fit(setting, steps=2)[0])
    assert all(torch.equal(value, again[part]) for part, value in first.items())


def test_what_a_patch_draws_in_an_inversion_is_the_same_each_time():
    setting = Setting()
    patched = tome(setting.model)
    found = inverted(setting, patched)
    assert torch.equal(found, inverted(setting, patched)) and not torch.equal(found, inverted_alone())
