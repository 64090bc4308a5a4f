"""SINE's guidance in ComfyUI: what is evaluated, two models in one module, windows, and the neighbours."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from .. import tiny_models
from .methods import run_node, sample
from .setting import SharedSetting as Setting
from .test_contract import area, control_net, freeu, hook_lora, pag, rescale_cfg

ATTENTION = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
CONVOLUTION = "diffusion_model.input_blocks.1.0.in_layers.2"
NORM = "diffusion_model.out.0"
STEPS, MORE = 2, 3  # of which guidance to 0.6 takes part in one, and in two


@functools.cache
def shapes() -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tiny_models.sd1().model.state_dict().items()}


def lora(seed: int = 4, strength: float = 0.3, keys=(ATTENTION, CONVOLUTION)) -> dict[str, torch.Tensor]:
    """Weights of a LoRA file for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key in keys:
        shape = shapes()[f"{key}.weight"]
        up, down = (shape[0], 2, *[1] * (len(shape) - 2)), (2, *shape[1:])
        found[f"{key}.lora_up.weight"] = strength * torch.randn(up, generator=generator)
        found[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator)
        found[f"{key}.alpha"] = torch.tensor(1.0)
    return found


def differences(seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights and a bias as a full fine-tune leaves them."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"{key}.diff": f"{key}.weight" for key in (ATTENTION, NORM)} | {f"{NORM}.diff_b": f"{NORM}.bias"}
    return {name: 0.3 * torch.randn(shapes()[of], generator=generator) for name, of in found.items()}


def with_lora(model, weights, strength: float = 1.0):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, weights, strength, 0.0)[0]


def other_loader(model_seed: int = 0):
    """The same weights in a module of their own, as a second loader node gives them."""
    return tiny_models.shared(("second loader", model_seed), functools.partial(tiny_models.sd1, model_seed))


def patch(setting, tuned, **changes):
    from likeness.nodes.guidance import LikenessGuidance

    inputs = {"model": setting.model, "tuned": tuned, "tuned_positive": setting.source}
    inputs |= {"base_weight": 0.7, "end_percent": 0.6, **changes}
    return run_node(LikenessGuidance, **inputs)[0]


def picture(setting, model, **changes):
    return sample(model, setting.target, setting.empty, setting.latent, **{"steps": STEPS, **changes})


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for rounding, which a sampling multiplies, and which differs between processors."""
    assert float((found - expected).norm() / expected.norm()) < 2e-4


def through_guider(setting, tuned, cfg: float = 4.0, **changes):
    """The same sampling as image(), by SamplerCustomAdvanced's own calls on our GUIDER."""
    import comfy.samplers

    from likeness.nodes.guidance import LikenessGuider

    inputs = {"positive": setting.target, "negative": setting.empty, "tuned": tuned, "tuned_positive": setting.source}
    inputs |= {"model": setting.model, "cfg": cfg, "base_weight": 0.7, "end_percent": 0.6, **changes}
    guider = run_node(LikenessGuider, **inputs)[0]
    noise = torch.randn(setting.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(setting.model.get_model_object("model_sampling"), "normal", STEPS)
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)


hooks: list = []


@pytest.fixture(autouse=True)
def no_hook_stays():
    """On a network that the next test has too."""
    yield
    while hooks:
        hooks.pop().remove()


class Evaluations:
    """Counts the samples that go through a model's network."""

    def __init__(self, *models) -> None:
        self.counts = [0] * len(models)
        for index, model in enumerate(models):
            hooks.append(model.model.diffusion_model.register_forward_pre_hook(self._count(index)))

    def _count(self, index: int):
        def hook(_module, inputs):
            self.counts[index] += inputs[0].shape[0]

        return hook


@pytest.mark.parametrize("weights", [lora, differences], ids=["lora", "diff"])
def test_one_loader_gives_what_two_loaders_give(weights):
    """The shared-module trap: whichever was loaded last, and whatever kind of patch."""
    setting = Setting()
    separate = picture(setting, patch(setting, with_lora(other_loader(), weights())), steps=MORE)
    shared = with_lora(setting.model, weights())
    plain = picture(setting, setting.model, steps=MORE)
    first = picture(setting, patch(setting, shared), steps=MORE)
    picture(setting, shared)  # loads the tuned weights into the module
    second = picture(setting, patch(setting, shared), steps=MORE)
    assert torch.equal(first, second), "the order of loading matters"
    assert_same(first, separate)
    assert float((first - plain).abs().mean()) > 1e-3
    assert torch.equal(plain, picture(setting, setting.model, steps=MORE))
    for part in setting.model.model.modules():
        assert not part._forward_hooks and not getattr(part, "weight_function", None)


@pytest.mark.parametrize("weights", [lora, differences], ids=["lora", "diff"])
@pytest.mark.parametrize("before", [True, False], ids=["lora-before", "lora-after"])
def test_a_lora_on_the_base_model_stays_with_whom_it_was_given_to(weights, before):
    """A style LoRA in front of the fork belongs to both; one behind the guidance to the base model alone."""
    style = lora(seed=9)
    setting, apart = Setting(), Setting()
    if before:
        setting.model = with_lora(setting.model, style)
        shared = patch(setting, with_lora(setting.model, weights()))
        tuned = with_lora(with_lora(other_loader(), style), weights())
        apart.model = with_lora(apart.model, style)
        separate = patch(apart, tuned)
    else:
        shared = with_lora(patch(setting, with_lora(setting.model, weights())), style)
        separate = with_lora(patch(apart, with_lora(other_loader(), weights())), style)
    assert_same(picture(setting, shared), picture(apart, separate))


def test_a_lora_hook_on_the_edit_prompt_is_not_heard_by_the_tuned_model():
    setting, apart = Setting(), Setting()
    results = []
    for each, tuned in ((setting, with_lora(setting.model, lora())), (apart, with_lora(other_loader(), lora()))):
        model, hooked = hook_lora(each, patch(each, tuned), each.target)
        results.append(sample(model, hooked, each.empty, each.latent, steps=STEPS))
    assert_same(*results)


def test_flow_models_are_mixed_on_their_own_schedule():
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    setting = Setting()
    setting.model = run_node(ModelSamplingSD3, model=setting.model, shift=3.0)[0]
    separate = run_node(ModelSamplingSD3, model=with_lora(other_loader(), lora()), shift=3.0)[0]
    one = picture(setting, patch(setting, with_lora(setting.model, lora())))
    assert_same(one, picture(setting, patch(setting, separate)))
    assert float((one - picture(setting, setting.model)).abs().mean()) > 1e-3
    refused("noise schedule", setting, run_node(ModelSamplingSD3, model=separate, shift=1.0)[0])


def test_two_tuned_models_of_a_second_loader_share_its_module():
    setting, second = Setting(), other_loader(1)
    one, other = with_lora(second, lora(4)), with_lora(second, lora(5))
    apart = with_lora(tiny_models.sd1(1), lora(5))
    results = []
    for style in (other, apart):
        subjects = subject(setting, style, 0.5)
        results.append(picture(setting, patch(setting, one, base_weight=0.6, subjects=subjects)))
    assert_same(results[0], results[1])


def subject(setting, model, weight, **changes):
    from likeness.nodes.guidance import LikenessSubjectModel

    inputs = {"model": model, "positive": setting.empty, "weight": weight, "end_percent": 0.6, **changes}
    return run_node(LikenessSubjectModel, **inputs)[0]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_guider_equals_model_patch_bit_for_bit(cfg):
    setting, tuned = Setting(), other_loader(1)
    assert torch.equal(picture(setting, patch(setting, tuned), cfg=cfg), through_guider(setting, tuned, cfg))


def test_the_positive_prompt_is_found_among_three_and_by_its_area():
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    setting, tuned = Setting(), other_loader(1)
    area = [[rows, {**options, "area": (8, 8, 0, 0)}] for rows, options in setting.target]

    def dual(model, positive):
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, setting.source, setting.empty)
        guider.set_cfg(3.0, 2.0)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 2.0, 1.0, 0.0])
            return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0, disable_pbar=True)

    ours = dual(patch(setting, tuned), setting.target)
    assert float((ours - dual(setting.model, setting.target)).abs().max()) > 0.1
    torch.testing.assert_close(dual(patch(setting, tuned), area), ours, atol=1e-2, rtol=1e-4)


def test_weights_of_quantised_layers_are_patched_unpacked():
    """Scaled fp8: a layer multiplies by its scale behind the functions of its weight."""
    from likeness.core.sine.host.overlay import _weight_function

    layer = torch.nn.Linear(4, 4)
    layer.scale_weight = torch.tensor(0.25)
    layer.convert_weight = lambda weight, inplace: weight * layer.scale_weight
    weight, change = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    patches = [(1.0, ("diff", (change,)), 1.0, None, None)]
    for start in (None, lambda: weight):
        found = _weight_function("layer.weight", patches, start, layer)(weight)
        torch.testing.assert_close(found * 0.25, weight * 0.25 + change)


def test_what_wraps_a_whole_sampling_of_the_tuned_model_is_said(caplog):
    from comfy.patcher_extension import WrappersMP

    setting, tuned = Setting(), other_loader(1)
    patch(setting, tuned)
    assert "takes no part" not in caplog.text

    def wrapped(model):
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "other pack", lambda executor, *args: executor(*args))
        return clone

    setting.model = wrapped(setting.model)
    patch(setting, with_lora(setting.model, lora()))  # it lies on both
    assert "takes no part" not in caplog.text
    patch(setting, wrapped(tuned))
    assert "takes no part (other pack)" in caplog.text


def test_wrappers_that_cannot_be_compared_are_said(caplog):
    """As two of Replace Subject, whose masks are tensors."""
    from comfy.patcher_extension import WrappersMP

    @dataclass
    class Wrapper:
        mask: torch.Tensor

        def __call__(self, executor, *args):
            return executor(*args)

    setting, tuned = Setting(), other_loader(1)
    for model in (setting.model, tuned):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "masked", Wrapper(torch.ones(2)))
    patch(setting, tuned)
    assert "takes no part (masked)" in caplog.text


@functools.cache
def guided_picture() -> torch.Tensor:
    setting = Setting()
    return picture(setting, patch(setting, other_loader(1)))


@pytest.mark.parametrize(
    "neighbour", [freeu, pag, rescale_cfg, area, control_net, hook_lora], ids=lambda node: node.__name__
)
def test_other_nodes_keep_their_effect(neighbour):
    setting, tuned = Setting(), other_loader(1)
    rest = setting.empty, setting.latent
    alone = sample(*neighbour(setting, setting.model, setting.target), *rest, steps=STEPS)
    ours = guided_picture()
    both = sample(*neighbour(setting, patch(setting, tuned), setting.target), *rest, steps=STEPS)
    assert float((both - ours).abs().mean()) > 1e-5 and float((both - alone).abs().mean()) > 1e-5
    off = neighbour(setting, patch(setting, tuned, base_weight=1.0), setting.target)
    assert torch.equal(alone, sample(*off, *rest, steps=STEPS))


@pytest.mark.parametrize("shared", [True, False], ids=["one-module", "two-modules"])
def test_three_evaluations_in_a_guided_step_and_two_after(shared):
    setting = Setting()
    tuned = with_lora(setting.model, lora()) if shared else other_loader(1)
    models = [setting.model] if shared else [setting.model, tuned]
    counted = Evaluations(*models)
    picture(setting, patch(setting, tuned), steps=5)  # "normal": 3 of 5 sigmas lie above percent 0.6
    assert sum(counted.counts) == 3 * 3 + 2 * 2
    assert shared or counted.counts == [10, 3]


def test_unneeded_evaluations_are_skipped():
    def counts(base_weight: float, cfg: float = 4.0, **changes) -> list[int]:
        setting, tuned = Setting(), other_loader(1)
        counted = Evaluations(setting.model, tuned)
        picture(setting, patch(setting, tuned, base_weight=base_weight, **changes), steps=MORE, cfg=cfg)
        return counted.counts

    assert counts(1.0) == [6, 0]
    assert counts(0.0) == [2 + 2, 2]  # the base model's edit prompt only after K
    assert counts(0.7, cfg=1.0) == [3, 2]
    assert counts(0.7, k_timestep=1000) == [6, 0] and counts(0.7, k_timestep=0) == [6, 3]


def test_asked_twice_in_one_step_the_tuned_model_predicts_once():
    setting, tuned = Setting(), other_loader(1)
    counted = Evaluations(tuned)
    model, _ = pag(setting, patch(setting, tuned), setting.target)
    picture(setting, model, steps=MORE)
    assert counted.counts == [2]


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "dpmpp_sde", "euler_ancestral", "uni_pc"])
def test_every_sampler_stays_inside_the_window(name):
    """The tuned model is asked above K and nowhere else, at the samplers' own in-between noise levels too."""
    import comfy.sample

    setting, tuned = Setting(), other_loader(1)
    seen: list[float] = []
    base: list[float] = []

    def record(into):
        def wrapper(executor, model, conds, x, timestep, model_options):
            into.append(float(timestep.max()))
            return executor(model, conds, x, timestep, model_options)

        return wrapper

    tuned.add_wrapper_with_key("calc_cond_batch", "test", record(seen))
    model = patch(setting, tuned)
    model.add_wrapper_with_key("calc_cond_batch", "test", record(base))
    noise = torch.randn(setting.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, 4, 4.0, name, "normal", setting.target, setting.empty, torch.zeros_like(noise),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    limit = setting.model.get_model_object("model_sampling").percent_to_sigma(0.6)
    assert seen == [sigma for sigma in base if sigma > limit * 1.0001] and 0 < len(seen) < len(base)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_one_model_is_the_chain_with_one_model(family):
    """v = 0.7 is the multi-model form with beta = 0.3; batches and odd sizes included."""
    setting = Setting(family)
    setting.latent = {"samples": torch.zeros(2, 4, 7, 10)}
    tuned = tiny_models.FAMILIES[family][0](1)
    single = picture(setting, patch(setting, tuned))
    chain = subject(setting, tuned, 0.3)
    chain = [type(chain[0])(**{**vars(chain[0]), "conditioning": setting.source})]
    other = patch(setting, tuned, base_weight=1.0, subjects=chain)
    torch.testing.assert_close(single, picture(setting, other), atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(single).all())


def test_a_control_net_in_the_training_prompt_is_loaded_and_heard():
    setting, tuned = Setting(), other_loader(1)
    plain = picture(setting, patch(setting, tuned))
    _, controlled = control_net(setting, setting.model, setting.source)
    assert float((picture(setting, patch(setting, tuned, tuned_positive=controlled)) - plain).abs().mean()) > 1e-5
    control = controlled[0][1]["control"]
    assert control.cond_hint is None and control.timestep_range is None


def test_the_base_model_is_as_it_was():
    setting, tuned = Setting(), with_lora(other_loader(), lora())
    before, options = picture(setting, setting.model), repr(setting.model.model_options)
    picture(setting, patch(setting, tuned))
    assert torch.equal(before, picture(setting, setting.model)) and repr(setting.model.model_options) == options
    assert not setting.model.additional_models and not setting.model.wrappers


def refused(match: str, setting, tuned, **changes):
    with pytest.raises(ValueError, match=match):
        patch(setting, tuned, **changes)


def test_bad_input_is_refused_before_sampling():
    import comfy.hooks
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

    setting, tuned = Setting(), other_loader(1)
    refused("add up to 1.3", setting, tuned, subjects=subject(setting, tuned, 1.0))
    patch(setting, tuned, subjects=subject(setting, tuned, 1.0), allow_over_one=True)
    refused("'k_timestep' is 1001, expected a number from -1 to 1000", setting, tuned, k_timestep=1001)
    refused("begin at 0.7 and end at 0.6", setting, tuned, start_percent=0.7)
    refused("'tuned_positive' is nothing, expected a list of prompts", setting, tuned, tuned_positive=[])
    refused("works on SDXL latents", setting, tiny_models.sdxl())
    refused("already carries a guidance", setting, patch(setting, tuned))
    flow = run_node(ModelSamplingSD3, model=tuned, shift=3.0)[0]
    refused("noise schedule", setting, flow)
    zero = run_node(ModelSamplingDiscrete, model=setting.model, sampling="eps", zsnr=True)[0]
    refused("noise schedule", setting, zero)
    hooked = comfy.hooks.set_hooks_for_conditioning(setting.source, comfy.hooks.create_hook_lora(lora(), 1.0, 0.0))
    refused("carries hooks", setting, tuned, tuned_positive=hooked)


def test_one_module_that_cannot_be_separated_is_refused():
    setting = Setting()
    patched = setting.model.clone()
    patched.add_object_patch("diffusion_model.out.2", torch.nn.Identity())
    refused("cannot be separated.*a copy of the checkpoint", setting, patched)


def test_a_node_behind_the_guidance_is_checked_when_sampling_starts():
    """What is put on the model later must not escape: another schedule, or a part of the shared module exchanged."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    setting = Setting()
    later = run_node(ModelSamplingSD3, model=patch(setting, other_loader(1)), shift=3.0)[0]
    with pytest.raises(ValueError, match="noise schedule"):
        picture(setting, later)
    shared = patch(setting, with_lora(setting.model, lora()))
    picture(setting, run_node(ModelSamplingSD3, model=shared, shift=3.0)[0])  # one module has one schedule
    shared = shared.clone()
    shared.add_object_patch("diffusion_model.out.2", torch.nn.Identity())
    with pytest.raises(ValueError, match="cannot be separated"):
        picture(setting, shared)


def test_one_module_with_the_same_schedule_applied_twice():
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    setting = Setting()
    tuned = run_node(ModelSamplingSD3, model=with_lora(setting.model, lora()), shift=3.0)[0]
    setting.model = run_node(ModelSamplingSD3, model=setting.model, shift=3.0)[0]
    assert bool(torch.isfinite(picture(setting, patch(setting, tuned))).all())


def test_a_compiled_model_and_its_lora_in_one_module():
    """A compiled layer would not notice what is added to it: the tuned model's own calls are eager."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    setting, tuned = Setting(), with_lora(other_loader(), lora(keys=[ATTENTION]))
    expected = picture(setting, patch(setting, tuned), cfg=1.0)
    assert float((expected - picture(setting, setting.model, cfg=1.0)).abs().max()) > 2e-3
    compiled = setting.model.clone()
    set_torch_compile_wrapper(compiled, "eager", keys=[ATTENTION])
    setting.model = compiled
    shared = with_lora(compiled, lora(keys=[ATTENTION]))
    found = picture(setting, patch(setting, shared), cfg=1.0)
    assert_same(found, expected)
    assert shared.wrappers["apply_model"]["torch.compile"], "the user's model lost its compilation"


def test_a_training_prompt_that_is_silent_somewhere_is_refused():
    from nodes import ConditioningCombine, ConditioningSetArea, ConditioningSetTimestepRange

    def timed(start, end):
        return run_node(ConditioningSetTimestepRange, conditioning=setting.source, start=start, end=end)[0]

    setting, tuned = Setting(), other_loader(1)
    refused("says nothing from 0 of the sampling on", setting, tuned, tuned_positive=timed(0.3, 1.0))
    refused("says nothing from 0.5 of the sampling on", setting, tuned, tuned_positive=timed(0.0, 0.5))
    patch(setting, tuned, tuned_positive=timed(0.0, 0.7))
    both = run_node(ConditioningCombine, conditioning_1=timed(0.0, 0.3), conditioning_2=timed(0.3, 1.0))[0]
    patch(setting, tuned, tuned_positive=both)
    left = run_node(ConditioningSetArea, conditioning=setting.source, width=32, height=64, x=0, y=0, strength=1.0)[0]
    refused("limited by area", setting, tuned, tuned_positive=left)


def test_a_prompt_without_words_is_said(caplog):
    setting = Setting()
    guided, said = patch(setting, with_lora(setting.model, lora())), "is the same as the negative prompt"
    picture(setting, guided)
    sample(guided, setting.empty, setting.empty, setting.latent, steps=1, cfg=1.0)  # takes no negative prompt
    assert said not in caplog.text
    sample(guided, setting.empty, setting.empty, setting.latent, steps=1)
    assert said in caplog.text


def test_the_base_model_as_its_own_tuned_model_is_said(caplog):
    setting = Setting()
    picture(setting, patch(setting, setting.model))
    assert "is the base model itself" in caplog.text
    caplog.clear()
    picture(setting, patch(setting, with_lora(setting.model, lora())))
    assert "itself" not in caplog.text


def test_a_window_without_a_step_is_said(caplog):
    setting, tuned = Setting(), other_loader(1)
    plain = picture(setting, setting.model)
    assert torch.equal(plain, picture(setting, patch(setting, tuned, start_percent=0.51, end_percent=0.52)))
    assert f"None of the {STEPS} steps" in caplog.text


def test_training_and_inversion_see_the_models_own_prediction_not_the_mix(tmp_path):
    """On a guided MODEL as on the plain one: what is learned, and where an image is inverted to."""
    import folder_paths

    from .methods import METHODS
    from .test_inversion import invert

    folder_paths.set_user_directory(str(tmp_path / "user"))
    plain, guided = Setting(), Setting()
    guided.model = patch(guided, other_loader(1), end_percent=1.0)
    assert torch.equal(invert(plain)[0].latents, invert(guided)[0].latents)
    hiper = METHODS[0]
    one, losses = hiper.fit(plain, steps=2)
    for path in (tmp_path / "user" / "likeness" / "runs").glob("*"):
        path.unlink()
    other, again = hiper.fit(guided, steps=2)
    assert losses == again and all(torch.equal(one.rows[step], other.rows[step]) for step in one.rows)


def personalized(setting, tuned, weak: float = 0.0):
    from likeness.nodes.guidance import LikenessPersonalizationGuidance

    return run_node(LikenessPersonalizationGuidance, model=setting.model, tuned=tuned, weak=weak)[0]


def by_hand(setting, tuned, weak, cfg: float = 4.0):
    """Two separately loaded models: the fine-tuned one with the prompt, the weak one with the null prompt."""
    import comfy.samplers

    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            prompt = comfy.samplers.calc_cond_batch(
                self.inner_model, [self.conds["positive"]], x, timestep, model_options or {}
            )[0]
            null = comfy.samplers.calc_cond_batch(weak.model, [self.conds["negative"]], x, timestep, {})[0]
            return null + cfg * (prompt - null)

    guider = Guider(tuned)
    guider.set_conds(setting.target, setting.empty)
    noise = torch.randn(setting.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([weak])
        weak.pre_run()
        sigmas = comfy.samplers.calculate_sigmas(setting.model.get_model_object("model_sampling"), "normal", STEPS)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0, disable_pbar=True)


@pytest.mark.parametrize("weights", [lora, differences], ids=["lora", "diff"])
@pytest.mark.parametrize("weak", [0.0, 0.4])
def test_personalization_guidance_is_the_papers_equation(weights, weak):
    setting = Setting()
    tuned = with_lora(setting.model, weights())
    expected = by_hand(setting, with_lora(other_loader(), weights()), with_lora(tiny_models.sd1(), weights(), weak))
    found = picture(setting, personalized(setting, tuned, weak))
    assert_same(found, expected)
    assert float((found - picture(setting, tuned)).abs().mean()) > 1e-3


def test_personalization_guidance_between_plain_guidance_and_two_files(caplog):
    setting = Setting()
    tuned = with_lora(setting.model, lora())
    plain, base = picture(setting, tuned), picture(setting, setting.model)
    assert_same(picture(setting, personalized(setting, tuned, 1.0)), plain)
    apart = with_lora(other_loader(), lora())
    assert_same(picture(setting, personalized(setting, apart)), picture(setting, personalized(setting, tuned)))
    with pytest.raises(ValueError, match="'weak' is 0.5, but the two models are two loaded files"):
        personalized(setting, apart, 0.5)
    assert torch.equal(base, picture(setting, setting.model)) and torch.equal(plain, picture(setting, tuned))
    counted = Evaluations(setting.model)
    picture(setting, personalized(setting, tuned))
    assert counted.counts == [2 * STEPS], "as many as in plain sampling"
    import comfy.samplers

    with torch.inference_mode():
        basic = comfy.samplers.CFGGuider(personalized(setting, tuned))
        basic.inner_set_conds({"positive": setting.target})
        noise = torch.zeros_like(setting.latent["samples"])
        sampler = comfy.samplers.sampler_object("euler")
        basic.sample(noise, noise, sampler, torch.tensor([2.0, 0.0]), seed=0, disable_pbar=True)
    assert "no negative prompt, so the guidance takes no part" in caplog.text
