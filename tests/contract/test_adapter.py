"""EZIGen's adapter on tiny models of ComfyUI's own classes: where it works, what it leaves alone, what is refused."""

from __future__ import annotations

import copy
import inspect
import logging
import types

import pytest
import torch

from .methods import autoencoder
from .setting import SharedSetting as Setting

STEPS, SEED, CFG = 5, 11, 3.0
FAMILIES = ["sd1", "sdxl"]


def stored(model, seed: int = 0, header: dict | None = None):
    """An adapter as training starts it, moved a little."""
    from likeness.core.ezigen.artifact import pack_adapter
    from likeness.core.ezigen.host.layers import new_adapter

    generator = torch.Generator().manual_seed(seed)
    found = pack_adapter(new_adapter(model.model), header or {})
    for value in found.tensors.values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    return found


def subject(setting: Setting, seed: int = 0, images: int = 1):
    from likeness.core.ezigen.host.adapter import encode_subject, prepare_images

    pictures = torch.rand(images, 40, 64, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(images, 40, 64)
    mask[:, 8:32, 10:50] = 1.0
    with torch.inference_mode():
        ready = prepare_images(pictures, mask, 64, 0.1)
        return encode_subject(setting.model, autoencoder(), setting.source, ready, seed)


def sampled(setting: Setting, model, sampler: str = "euler", steps: int = STEPS, batch: int = 1) -> torch.Tensor:
    import comfy.sample
    import comfy.samplers

    shape = (batch, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        levels = comfy.samplers.calculate_sigmas(setting.model.get_model_object("model_sampling"), "simple", steps)
        chosen = comfy.samplers.sampler_object(sampler)
        latent = torch.zeros(shape)
        return comfy.sample.sample_custom(
            model, noise, CFG, chosen, levels, setting.target, setting.empty, latent, disable_pbar=True, seed=SEED
        )


def applied(setting: Setting, adapter=None, about=None, **more):
    from likeness.core.ezigen.host.adapter import with_adapter

    with torch.inference_mode():
        return with_adapter(setting.model, adapter or stored(setting.model), about or subject(setting), **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_subject_changes_the_picture_and_the_base_stays_as_it_is(family):
    setting = Setting(family)
    before, options = sampled(setting, setting.model), copy.deepcopy(setting.model.model_options)
    one, other = (applied(setting, about=subject(setting, seed)) for seed in (0, 1))
    first, second = sampled(setting, one), sampled(setting, other)
    assert float((first - before).abs().max()) > 1e-3
    assert float((first - second).abs().max()) > 1e-4
    assert torch.equal(sampled(setting, one), first)
    assert torch.equal(sampled(setting, setting.model), before)
    assert setting.model.model_options == options and not setting.model.wrappers.get("sampler_sample")


@pytest.mark.parametrize("apply_to", ["both", "positive only"])
def test_the_subject_is_projected_once_in_a_sampling(monkeypatch, apply_to):
    """Its keys and values are the same in every step; the latent is that of projecting them in each, bit for bit."""
    from likeness.core.ezigen import adapter

    setting = Setting()
    model = applied(setting, apply_to=apply_to)
    asked: list[int] = []
    project, forward = adapter.Adapter.project, adapter.Adapter.forward

    def counted(self, index, *more):
        asked.append(index)
        return project(self, index, *more)

    monkeypatch.setattr(adapter.Adapter, "project", counted)
    once = sampled(setting, model)
    layers = len(set(asked))
    assert layers > 1 and len(asked) == layers
    monkeypatch.setattr(adapter.Adapter, "forward", lambda self, *given: forward(self, *given[:4]))
    assert torch.equal(sampled(setting, model), once)
    assert len(asked) > STEPS * layers


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_only_the_last_part_of_the_steps(sampler):
    """Where it does not work yet predictions and latents are the base's, bit for bit; behind that they are not.

    heun asks a second time within a step, at the level of the next one: there the last step of the layout already sees
    the subject, so the latent that it leaves is not the base's.
    """
    import comfy.samplers

    setting = Setting()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    model = applied(setting, ratio=0.4)
    for name, each in (("base", setting.model), ("adapter", model)):
        steps = seen.setdefault(name, [])
        guider = comfy.samplers.CFGGuider(each)
        guider.set_conds(setting.target, setting.empty)
        guider.set_cfg(CFG)
        levels = comfy.samplers.calculate_sigmas(each.get_model_object("model_sampling"), "simple", STEPS)
        noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(SEED))

        def keep(_step, denoised, x, _total, steps=steps):
            steps.append((denoised.clone(), x.clone()))

        with torch.inference_mode():
            guider.sample(
                noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), levels, callback=keep,
                disable_pbar=True, seed=SEED,
            )  # fmt: skip
    pairs = list(zip(seen["base"], seen["adapter"], strict=True))
    latents = [torch.equal(one, other) for (_, one), (_, other) in pairs]  # what a step begins with
    assert latents == [True, True, True, sampler != "heun", False]
    if sampler != "heun":
        assert [torch.equal(one, other) for (one, _), (other, _) in pairs] == [True, True, True, False, False]


def test_off_is_skipped_and_strength_goes_between():
    setting = Setting()
    base = sampled(setting, setting.model)
    assert torch.equal(sampled(setting, applied(setting, strength=0.0)), base)
    distances = [float((sampled(setting, applied(setting, strength=s)) - base).norm()) for s in (0.01, 0.1, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_the_positive_prompt_alone():
    """The negative prompt's prediction is then the base's own, whichever way ComfyUI batches the two."""

    setting = Setting()
    predictions: dict[str, list[torch.Tensor]] = {}
    for apply_to in ("both", "positive only", "base"):
        model = setting.model.clone() if apply_to == "base" else applied(setting, apply_to=apply_to)
        kept = predictions.setdefault(apply_to, [])

        def note(args, kept=kept):
            kept[:] = kept or [args["uncond_denoised"].clone(), args["cond_denoised"].clone()]
            return args["denoised"]

        model.set_model_sampler_post_cfg_function(note)
        sampled(setting, model, steps=1)
    assert torch.equal(predictions["positive only"][0], predictions["base"][0])
    assert not torch.allclose(predictions["both"][0], predictions["base"][0], atol=1e-4)
    torch.testing.assert_close(predictions["positive only"][1], predictions["both"][1], atol=1e-5, rtol=1e-5)


def test_the_positive_prompt_alone_in_areas():
    """For an area of the positive prompt ComfyUI makes an entry of the negative one that bears the same name."""
    setting = Setting()
    (rows, about), (others, more) = setting.target[0], setting.source[0]
    areas = [[rows, {**about, "area": (4, 8, 0, 0)}], [others, {**more, "area": (4, 8, 4, 0)}]]
    setting.target = areas
    base, one, both = (
        sampled(setting, model)
        for model in (setting.model, applied(setting, apply_to="positive only"), applied(setting))
    )
    assert float((one - base).abs().max()) > 1e-3 and float((one - both).abs().max()) > 1e-3


def test_the_positive_prompt_alone_in_any_guider(monkeypatch):
    """Of three prompts, too, and where an area of one has made entries of the others."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    from likeness.core.ezigen.host import adapter as host

    setting, seen = Setting(), set()
    model = applied(setting, ratio=1.0, apply_to="positive only")
    made = host._Injection._patch

    def spied(injection, tokens, level, excluded):
        patch = made(injection, tokens, level, excluded)

        def spy(h, options):
            places = zip(options["cond_or_uncond"], options["uuids"], strict=True)
            seen.update((place, name in excluded) for place, name in places)
            return patch(h, options)

        return spy

    monkeypatch.setattr(host._Injection, "_patch", spied)
    area = [[rows, {**options, "area": (8, 8, 0, 0)}] for rows, options in setting.target]
    for positive in (setting.target, area):
        guider = Guider_DualCFG(model)
        guider.set_conds(positive, setting.source, setting.empty)
        guider.set_cfg(3.0, 2.0)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([5.0, 1.0, 0.0])
            guider.sample(noise, torch.zeros_like(noise), euler, sigmas, seed=0, disable_pbar=True)
        assert seen == {(0, True), (1, False), (2, False)}, positive  # negative, middle, positive


def test_other_nodes_ask_a_model_with_an_adapter():
    """They have no steps: the part of the timesteps counts there, and in a sampling of a single step."""
    from likeness.core.session.session import Session, predicting

    setting = Setting()
    adapted = applied(setting, ratio=0.4)
    table = setting.model.get_model_object("model_sampling").sigmas
    for ask in (predicting, lambda *given: Session(*given[:-1]).run(given[-1])):
        found: dict[str, list[torch.Tensor]] = {}
        for name, model in (("base", setting.model), ("adapted", adapted)):
            found[name] = []

            def body(denoiser, x0, kept=found[name]):
                for timestep in (300, 500):
                    x = x0 + float(table[timestep])
                    kept.append(denoiser.denoised(x, table[timestep].view(1)).detach().clone())

            with torch.inference_mode():
                ask(model, setting.source, setting.latent["samples"], body)
        late, early = (float((a - b).abs().max()) for a, b in zip(found["base"], found["adapted"], strict=True))
        assert late > 1e-4 and early == 0.0
    assert torch.equal(sampled(setting, adapted, steps=1), sampled(setting, setting.model, steps=1))


def test_batches_and_several_pictures():
    """Rows of a batch do not see each other; two images are not one; the order of images does not matter."""
    setting = Setting()
    one, two = subject(setting, 0), subject(setting, 1)
    adapter = stored(setting.model)
    alone = sampled(setting, applied(setting, adapter, one))
    together = sampled(setting, applied(setting, adapter, one), batch=3)
    noise_first = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(SEED))[:1]
    assert torch.equal(noise_first, torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(SEED)))
    torch.testing.assert_close(together[:1], alone, atol=2e-3, rtol=0)
    both = sampled(setting, applied(setting, adapter, one.with_subject(two)))
    turned = sampled(setting, applied(setting, adapter, two.with_subject(one)))
    torch.testing.assert_close(both, turned, atol=2e-3, rtol=0)
    assert float((both - alone).abs().max()) > 1e-2


def test_encoding_is_of_the_bare_model_and_of_its_seed():
    """Patches of other nodes on the MODEL do not reach the features; the global random numbers stay untouched."""
    setting = Setting()
    plain = subject(setting)
    state = torch.get_rng_state()
    busy = Setting()
    busy.model = busy.model.clone()
    busy.model.set_model_attn1_patch(lambda q, k, v, options: (0.5 * q, k, v))
    busy.model.set_model_attn1_output_patch(lambda n, options: 0 * n)
    found = subject(busy)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(plain.tokens.layers, found.tokens.layers, strict=True):
        assert torch.equal(one, other)
    again = subject(setting, seed=0)
    assert all(map(torch.equal, plain.tokens.layers, again.tokens.layers))
    widths = [layer.shape for layer in plain.tokens.layers]
    assert widths[0] == (1, 64, 32) and len(widths) == 5


def test_beside_other_nodes_patches():
    """A middle_patch and an attention patch of others hold as before."""
    setting = Setting()
    adapter, about = stored(setting.model), subject(setting)
    patched = setting.model.clone()
    patched.set_model_patch(lambda h, options: 0.9 * h, "middle_patch")
    setting.model = patched
    with_both = sampled(setting, applied(setting, adapter, about))
    assert float((with_both - sampled(setting, patched)).abs().max()) > 1e-3
    plain = Setting()
    assert float((with_both - sampled(plain, applied(plain, adapter, about))).abs().max()) > 1e-3


def test_a_second_adapter_replaces_the_first():
    setting = Setting()
    first, second = stored(setting.model, 1), stored(setting.model, 2)
    wanted = sampled(setting, applied(setting, second))
    setting.model = applied(setting, first)
    assert torch.equal(sampled(setting, applied(setting, second, subject(Setting()))), wanted)


def test_gradients_reach_a_prompt_through_the_adapter():
    from likeness.core.session.session import Session

    setting = Setting()
    found: list[torch.Tensor] = []

    def body(denoiser, x0):
        context = denoiser.context.detach().clone().requires_grad_(True)
        denoiser.denoised(x0, denoiser.sigmas[300].view(1), context).square().mean().backward()
        found.append(context.grad)

    for model in (setting.model, applied(setting)):
        with torch.inference_mode():
            Session(model, setting.source, setting.latent["samples"]).run(body)
    assert float(found[1].abs().max()) > 0 and not torch.allclose(found[0], found[1])


def test_what_does_not_belong_together_is_refused():
    from likeness.core.ezigen.host.layers import places

    setting, other = Setting("sd1"), Setting("sdxl")
    adapter, about = stored(setting.model), subject(setting)
    with pytest.raises(ValueError, match="subject was made for .* connect the model it was encoded with"):
        applied(other, stored(other.model), about)
    with pytest.raises(ValueError, match="this model's UNet takes 64"):
        applied(other, adapter, subject(other))
    with pytest.raises(ValueError, match="predicts v"):
        applied(Setting("sd2_v"), adapter, about)
    transformer = types.SimpleNamespace(
        diffusion_model=torch.nn.Identity(), model_config=types.SimpleNamespace(unet_config={})
    )
    with pytest.raises(ValueError, match="UNet of SD1.x"):
        places(transformer)


def test_adapter_of_another_model_of_the_same_shape_is_said(caplog):
    from likeness.core.ezigen.host.adapter import model_base_sample

    caplog.set_level(logging.WARNING, logger="likeness")
    one, other = Setting(), Setting(model_seed=1)
    own = stored(one.model, header={"base": model_base_sample(one.model)})
    applied(one, own)
    assert "another model" not in caplog.text
    applied(other, own, subject(other))
    assert "The adapter was trained with another model" in caplog.text


def test_prepared_pictures(caplog):
    from likeness.core.ezigen.host.adapter import prepare_images

    caplog.set_level(logging.WARNING, logger="likeness")
    image = torch.full((1, 40, 60, 3), 0.2)
    mask = torch.zeros(1, 40, 60)
    mask[:, 10:20, 20:40] = 1.0
    ready = prepare_images(image, mask, 64, 0.0)
    assert ready.shape == (1, 64, 64, 3) and float(ready[0, 32, 32].max()) < 0.25
    assert float(ready[0, 4].min()) > 0.95 and float(ready[0, -4].min()) > 0.95  # white above and below
    alpha = torch.cat([image, mask[..., None]], -1)
    torch.testing.assert_close(prepare_images(alpha, None, 64, 0.0), ready)
    assert not caplog.text
    whole = prepare_images(image, None, 64, 0.1)
    assert float(whole[0, 2].min()) > 0.95 and float(whole[0, 32].max()) < 0.3
    assert "no white background" in caplog.text
    nothing = torch.zeros(1, 64, 64)  # as Load Image gives where nothing was painted
    with pytest.raises(ValueError, match="mask is empty.*no white background: paint"):
        prepare_images(image, nothing, 64, 0.1)
    white = torch.where(mask[..., None] > 0, image, 1.0)
    torch.testing.assert_close(prepare_images(white, nothing, 64, 0.1), prepare_images(white, None, 64, 0.1))
    torch.testing.assert_close(prepare_images(alpha, nothing, 64, 0.0), ready)
    with pytest.raises(ValueError, match="The mask is empty.*: paint"):
        prepare_images(image.expand(2, -1, -1, -1), torch.cat([mask, 0 * mask]), 64, 0.1)
    with pytest.raises(ValueError, match="one for each"):
        prepare_images(image, mask.expand(3, -1, -1), 64, 0.1)


def test_a_name_is_refused_before_anything_runs_unless_it_comes_by_a_link():
    """ComfyUI asks with None then, and leaves only the named inputs to the node."""
    from likeness.nodes import adapter, embedding, masks, sana, score, similarity, train_adapter, tuned_files

    loaders = [adapter.LikenessLoadAdapter, similarity.LikenessLoadRetrievalModel, tuned_files.LikenessLoadTuned]
    loaders += [embedding.LikenessLoadEmbedding, sana.LikenessLoadSana, score.LikenessLoadVision]
    named = {"name": loaders, "folder": [train_adapter.LikenessTrainAdapter], "model": [masks.LikenessCaption]}
    for name, nodes in named.items():
        for node in nodes:
            assert inspect.getfullargspec(node.validate_inputs).args == ["cls", name]
            assert node.validate_inputs(**{name: None}) is True and node.fingerprint_inputs(**{name: None}) == ""
            told = node.validate_inputs(**{name: "absent"})
            assert told == node.validate_inputs("absent") and told.startswith("There is no ") and "press R" in told


def test_the_nodes_one_after_the_other():
    """Load what training left, extract it, load that, encode with alpha, apply: as calling the functions."""
    from pathlib import Path

    from likeness.core.ezigen.artifact import save_adapter
    from likeness.core.session import folders
    from likeness.nodes.adapter import (
        LikenessApplyAdapter,
        LikenessEncodeSubject,
        LikenessExtractAdapter,
        LikenessLoadAdapter,
    )

    setting = Setting()
    folder = Path(folders.roots(folders.ADAPTERS)[0]) / "checkpoint-7"
    adapter = stored(setting.model)
    save_adapter(folder / "model.safetensors", adapter)
    assert "checkpoint-7" in folders.names(folders.ADAPTERS)
    pictures = torch.rand(1, 40, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 40, 64)
    mask[:, 8:32, 10:50] = 1.0
    with torch.inference_mode():
        whole, info = LikenessLoadAdapter.execute("checkpoint-7").result
        _, name = LikenessExtractAdapter.execute(whole, "float32", "likeness/test").result
        extracted, again = LikenessLoadAdapter.execute(name).result
        alpha = torch.cat([pictures, mask[..., None]], -1)
        about, seen = LikenessEncodeSubject.execute(
            setting.model, autoencoder(), setting.source, alpha, 64, 0, margin=0.1
        ).result
        (model,) = LikenessApplyAdapter.execute(setting.model, extracted, about, 0.4, 1.0).result
        two, _ = LikenessEncodeSubject.execute(
            setting.model, autoencoder(), setting.source, alpha, 64, 1, subject=about
        ).result
    assert info == again and seen.shape == (1, 64, 64, 3)
    wanted = sampled(setting, applied(setting, adapter, subject(setting), ratio=0.4))
    assert torch.equal(sampled(setting, model), wanted)
    assert two.tokens.layers[0].shape[1] == 2 * about.tokens.layers[0].shape[1]


PUBLISHED = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2] * 4},
    **{"channel_mult": [1, 2, 4, 4], "use_spatial_transformer": True, "transformer_depth": [1] * 6 + [0] * 2},
    **{"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "legacy": False},
    **{"use_temporal_attention": False, "adm_in_channels": None, "dtype": torch.float16},
}


@pytest.mark.parametrize(
    ("more", "heads"),
    [
        ({"context_dim": 1024, "use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 64}, 5),
        ({"context_dim": 768, "use_linear_in_transformer": False, "num_heads": 8, "num_head_channels": -1}, 8),
    ],
    ids=["SD2.1-base", "SD1.5"],
)
def test_the_published_size(more, heads):
    """The adapter of SD2.1-base has 113 tensors of 49,599,056 numbers, in the published places."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from likeness.core.ezigen.adapter import Adapter
    from likeness.core.ezigen.artifact import StoredAdapter
    from likeness.core.ezigen.host.layers import places

    config = {**PUBLISHED, **more}
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    base = types.SimpleNamespace(diffusion_model=unet, model_config=types.SimpleNamespace(unet_config=config))
    found = places(base)
    widths = [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    assert [place.layer.width for place in found] == widths
    expected = [heads * width // 320 if heads == 5 else heads for width in widths]
    assert [place.layer.heads for place in found] == expected
    with torch.device("meta"):
        adapter = Adapter([place.layer for place in found])
    named = adapter.published_parameters()
    assert len(named) == 113 and sum(value.numel() for value in named.values()) == 49_599_056
    assert StoredAdapter(named).order() == [place.layer.name for place in found]
    blocks = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    assert [place.key for place in found] == [(*block, 0) for block in blocks]


def test_a_mask_of_the_surroundings_and_one_of_another_proportion():
    """Load Image gives the transparent part of an image as its mask, which is all but the subject."""
    from likeness.core.ezigen.host.adapter import prepare_images

    picture = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 40, 60)
    mask[:, 10:30, 20:50] = 1.0
    assert torch.equal(prepare_images(picture, 1 - mask, 64, 0.1), prepare_images(picture, mask, 64, 0.1))
    with pytest.raises(ValueError, match="64 x 40 pixels, its image 60 x 40"):
        prepare_images(picture, torch.ones(1, 40, 64), 64, 0.1)


def test_a_lora_on_the_model_is_no_other_base(caplog):
    """Neither for what is noted of a model nor for what is compared with it, before and after it was loaded."""
    from likeness.core.ezigen.host.adapter import model_base_sample

    setting = Setting()
    before = model_base_sample(setting.model)
    adapter = stored(setting.model, header={"base": before})
    about, tuned = subject(setting), setting.model.clone()
    names = [name for name in setting.model.model.state_dict() if name.endswith("attn1.to_q.weight")]
    shapes = {name: setting.model.model.state_dict()[name].shape for name in names}
    tuned.add_patches({name: ("diff", (torch.ones(shape),)) for name, shape in shapes.items()})
    with torch.inference_mode():
        sampled(setting, tuned, steps=2)
    caplog.clear()
    setting.model = tuned
    applied(setting, adapter, about)
    assert "another model of this shape" not in caplog.text and model_base_sample(tuned) == before


def test_the_same_adapter_in_another_part_of_the_steps():
    from likeness.core.ezigen.host.adapter import KEY, with_ratio

    setting = Setting()
    adapter, about = stored(setting.model), subject(setting)
    late, always = (applied(setting, adapter, about, ratio=ratio) for ratio in (0.4, 1.0))
    derived = with_ratio(late, 1.0)
    assert torch.equal(sampled(setting, derived), sampled(setting, always))
    assert derived.additional_models[KEY][0].model is late.additional_models[KEY][0].model
    assert not torch.equal(sampled(setting, late), sampled(setting, always))


def test_levels_that_rise_are_split_by_their_noise():
    """An image walked up (FlipSigmas) is looked at where a sampling would look."""
    import comfy.samplers

    from likeness.core.ezigen.host.adapter import with_adapter

    setting = Setting()
    with torch.inference_mode():
        model = with_adapter(setting.model, stored(setting.model), subject(setting), 0.4)
        (injection,) = model.wrappers["sampler_sample"]["likeness.adapter"]
        scheme = setting.model.get_model_object("model_sampling")
        levels = comfy.samplers.calculate_sigmas(scheme, "simple", STEPS)
    assert injection._first_level(levels.flip(0), scheme) == injection._first_level(levels, scheme)
