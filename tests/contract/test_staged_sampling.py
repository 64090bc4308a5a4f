"""EZIGen's stages on a tiny model: the same as stock nodes make them, when the loops end, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from likeness.core.denoiser import rescaled
from likeness.core.ezigen.staged import Loops, split

from ..vision.models import clip_folder
from .methods import autoencoder
from .setting import SharedSetting as Setting
from .test_adapter import stored, subject

STEPS = 5
LATENT = torch.zeros(1, 4, 8, 8)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny CLIP."""
    from likeness.core.vision.host.vision import load_vision

    folder = tmp_path_factory.mktemp("vision") / "clip"
    clip_folder(folder)
    with torch.inference_mode():
        return load_vision(folder)


@pytest.fixture(scope="module")
def parts():
    setting = Setting()
    return setting, stored(setting.model), subject(setting)


def staged(parts, vision=None, start=None, latent=LATENT, model=None, vae=None, **changes):
    from likeness.core.ezigen.host import staged as host

    setting, adapter, about = parts
    inputs = model or setting.model, vae or autoencoder(), adapter, about, setting.target, setting.empty, vision
    stages = host.StagedSampling(*inputs, 7, STEPS, 3.0, loops=Loops(2, 2), loop_negative=setting.source)
    with torch.inference_mode():
        image, images, found, report = host.sample_staged(replace(stages, **changes), latent, start)
    return SimpleNamespace(image=image, images=images, latent=found["samples"], report=report)


def by_stock_nodes(parts, published=False):
    """The first sampling and a loop, by the stock nodes of the graph and Apply Subject Adapter."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import AddNoise, Noise_RandomNoise, SamplerCustom

    from likeness.core.ezigen.host.adapter import with_adapter
    from likeness.core.ezigen.host.staged import STEP_SEEDS

    setting, adapter, about = parts
    sampling, vae = setting.model.get_model_object("model_sampling"), autoencoder()
    sampler = comfy.samplers.sampler_object("ddpm")
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
        looking, always = (with_adapter(setting.model, adapter, about, ratio) for ratio in (0.4, 1.0))
        first = SamplerCustom.execute(
            looking, True, 7, 3.0, setting.target, setting.empty, sampler, sigmas, {"samples": LATENT}
        )[0]["samples"]
        _, levels = split(sigmas, 0.4)
        z, noise = vae.encode(vae.decode(first)), Noise_RandomNoise(8)
        x = AddNoise.execute(setting.model, noise, levels, {"samples": z})[0]["samples"]
        if published:
            scale = setting.model.model.latent_format.scale_factor
            level = sampling.sigmas[400]
            x = rescaled(z * scale + level * noise.generate_noise({"samples": z}), level, levels[0]) / scale
        second = SamplerCustom.execute(
            always, False, 8 + STEP_SEEDS, 3.0, setting.target, setting.source, sampler, levels, {"samples": x}
        )[0]["samples"]
        return vae.decode(first), vae.decode(second)


@pytest.mark.parametrize("published", [False, True])
def test_as_stock_nodes_make_it(parts, published):
    found = staged(parts, loops=Loops(1, 1), published_level=published)
    wanted = by_stock_nodes(parts, published)
    for one, other in zip(found.images.split(1), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 if published else 0, rtol=0)
    assert torch.equal(found.image, found.images[-1:])
    assert "5 steps and 1 times 2" in found.report
    assert float((found.images[0] - found.images[1]).abs().max()) > 1e-3


class Lossless:
    """An autoencoder whose images [B, 8 h, 8 w, 3] hold the latents [B, 4, h, w] and nothing else."""

    def __init__(self):
        values = torch.randn(8 * 8 * 3, 4, generator=torch.Generator().manual_seed(5))
        self.columns = torch.linalg.qr(values)[0]

    def spacial_compression_encode(self):
        return 8

    def decode(self, latents):
        cells = (latents.movedim(1, -1) @ self.columns.T).unflatten(-1, (8, 8, 3))
        return cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2) + 0.5

    def encode(self, pictures):
        cells = (pictures - 0.5).unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).permute(0, 1, 3, 2, 4, 5)
        return (cells.flatten(3) @ self.columns).movedim(-1, 1)


def test_a_loop_has_the_noise_of_its_levels(parts):
    """With a perfect denoiser, on the CPU, where a sampler's own noise may be the very noise of the same seed."""
    vae, model, found = Lossless(), parts[0].model.clone(), []
    z = torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    start = vae.decode(model.model.process_latent_out(z))

    def perfect(_network, given):  # instead of the network
        images = z.repeat(len(given["input"]) // len(z), 1, 1, 1)
        found.append(float((given["input"] - images).std() / given["timestep"][0]))
        return images

    model.set_model_unet_function_wrapper(perfect)
    staged(parts, start=start, model=model, vae=vae, steps=10, loops=Loops(1, 1))
    assert len(found) == 4 and all(abs(part - 1.0) < 0.02 for part in found), found


def test_nine_loops_keep_the_contrast_and_at_the_published_level_a_quarter_is_lost(parts):
    """With a perfect denoiser of images that may have any contrast: what it sees best of the noisy latent x is
    c z, of the clean one z and c = <x, z> / <z, z>.
    """
    setting, vae = parts[0], Lossless()
    model, z = setting.model.clone(), torch.randn(16, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    start = model.model.process_latent_out(z)
    pictures = vae.decode(start)
    torch.testing.assert_close(vae.encode(pictures), start)

    def perfect(_network, given):  # x0 by the noisy latents, instead of the network
        x, pictures_of = given["input"], z.repeat(len(given["input"]) // len(z), 1, 1, 1)
        contrast = (x * pictures_of).flatten(1).sum(1) / pictures_of.square().flatten(1).sum(1)
        return contrast.view(-1, 1, 1, 1) * pictures_of

    model.set_model_unet_function_wrapper(perfect)
    left = {}
    for published in (False, True):
        settings = {"steps": 50, "published_level": published}
        found = staged(parts, start=pictures, model=model, vae=vae, loops=Loops(9, 9), **settings)
        contrast = found.images.flatten(1).std(1).view(10, -1).mean(1)
        left[published] = float(contrast[-1] / contrast[0])
    assert abs(1 - left[False]) <= 0.03, left
    assert left[True] == pytest.approx(0.966**9, abs=0.03), left  # of the signal each loop starts with


def test_the_same_seed_gives_the_same_and_the_model_stays_as_it_is(parts):
    setting = parts[0]
    short = {"loops": Loops(1, 1)}
    one, again, other = (staged(parts, seed=seed, **short) for seed in (7, 7, 8))
    assert torch.equal(one.latent, again.latent) and not torch.equal(one.latent, other.latent)
    assert not setting.model.wrappers.get("sampler_sample") and not setting.model.additional_models
    assert len(one.images) == 2
    assert staged(parts, seed=2**64 - 1, **short).latent.shape == LATENT.shape


def test_it_ends_when_two_pictures_are_alike(parts, vision):
    start = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    soon, never = (staged(parts, vision, start, loops=Loops(1, 3, threshold=limit)) for limit in (-1.0, 1.1))
    assert len(soon.images) == 2 and len(never.images) == 4
    assert "like the one before" in soon.report
    torch.testing.assert_close(soon.image, never.images[1:2], atol=1e-5, rtol=0)


def test_nothing_is_asked_twice(parts, vision):
    """Subject features are there already, every image is looked at once."""
    asked = []
    modules = {"UNet": parts[0].model.model.diffusion_model, "vision": vision.model}
    hooks = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: asked.append(name))
        for name, module in modules.items()
    ]
    try:
        found = staged(parts, vision, start=torch.rand(1, 64, 64, 3), loops=Loops(3, 3))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(found.images) == 4 and asked.count("UNet") == 3 * 2 and asked.count("vision") == 4


def test_the_best_picture_is_the_one_most_like_the_subject(parts, vision):
    from likeness.core.vision.host.vision import embed

    found = staged(parts, vision, loops=Loops(3, 3), keep_best=True)
    with torch.inference_mode():
        wanted = embed(vision, parts[2].images)
        scores = [float(torch.cosine_similarity(embed(vision, each), wanted)) for each in found.images.split(1)]
    best = scores.index(max(scores))
    assert torch.equal(found.image, found.images[best : best + 1])
    assert "best: image" in found.report


def test_from_a_picture_of_another_model_and_rectangular(parts):
    start = torch.rand(2, 67, 101, 3, generator=torch.Generator().manual_seed(4))
    whole = start[:, :64, :96]
    found = staged(parts, start=start, latent=torch.zeros(2, 4, 8, 12), loops=Loops(1, 1))
    assert torch.equal(found.images[:2], whole) and found.image.shape == whole.shape
    nothing = staged(parts, start=start, loops=Loops(0, 0))
    assert len(nothing.images) == 2 and "0 steps and 0 times" in nothing.report


def test_of_the_latent_only_the_size_counts(parts):
    wanted = staged(parts, loops=Loops(0, 0)).latent
    for latent in (torch.zeros(1, 16, 8, 8), torch.rand(1, 4, 8, 8)):
        assert torch.equal(staged(parts, latent=latent, loops=Loops(0, 0)).latent, wanted)


def test_one_adapter_for_both_parts(parts, monkeypatch):
    from likeness.core.ezigen.host import adapter as host

    loaded, made = host.load_patcher, []
    monkeypatch.setattr(host, "load_patcher", lambda *given: made.append(loaded(*given)) or made[-1])
    staged(parts, loops=Loops(1, 1))
    assert len(made) == 1


def test_a_large_picture_is_warned_of(parts, caplog, monkeypatch):
    from likeness.core.ezigen.host import staged as host

    assert host.LARGE == 1024
    monkeypatch.setattr(host, "LARGE", 64)
    staged(parts, start=torch.zeros(1, 64, 80, 3), loops=Loops(0, 0))
    assert not caplog.text
    staged(parts, start=torch.zeros(1, 72, 80, 3), loops=Loops(0, 0))
    assert "80 x 72 pixels" in caplog.text and "512 on its short side" in caplog.text


def test_a_prompt_without_words_is_warned_of(parts, caplog):
    setting, *rest = parts
    staged(parts, loops=Loops(0, 0))
    assert "negative prompt" not in caplog.text
    wordless = copy.copy(setting)
    wordless.target = setting.empty
    staged((wordless, *rest), loops=Loops(0, 0), cfg=1.0)  # takes no negative prompt
    assert "negative prompt" not in caplog.text
    staged((wordless, *rest), loops=Loops(0, 0))
    assert "is the same as the negative prompt, or both are empty: write what" in caplog.text


def test_what_is_refused(parts):
    with pytest.raises(ValueError, match="have 16 channels, the model's 4"):
        staged(parts, vae=autoencoder(16))
    with pytest.raises(ValueError, match="connect a CLIP_VISION"):
        staged(parts, loops=Loops(1, 3))
    with pytest.raises(ValueError, match="connect a CLIP_VISION"):
        staged(parts, keep_best=True)
    with pytest.raises(ValueError, match="between 0 and 1"):
        staged(parts, split_ratio=1.0)
    with pytest.raises(ValueError, match="divisor of 1000"):
        staged(parts, steps=30)


def test_the_nodes(parts, vision):
    """What the nodes give is what the functions make."""

    from likeness.nodes.staged import LikenessStagedEdit, LikenessStagedSampler

    setting, adapter, about = parts
    given = {"model": setting.model, "vae": autoencoder(), "adapter": adapter, "subject": about}
    given |= {"positive": setting.target, "negative": setting.empty, "seed": 7, "steps": STEPS, "cfg": 3.0}
    for node in (LikenessStagedSampler, LikenessStagedEdit):
        standard = {entry.id: entry.default for entry in node.define_schema().inputs if hasattr(entry, "default")}
        given |= {name: standard[name] for name in ("split_ratio", "min_loops", "max_loops", "threshold")}
        assert given["min_loops"] == given["max_loops"] == 3, "what runs without a vision model"
    with torch.inference_mode():
        image, loops, latent, report = LikenessStagedSampler.execute(
            latent={"samples": LATENT}, loop_negative=setting.source, **given
        ).result
        wanted = staged(parts, loops=Loops(3, 3))
        assert torch.equal(image, wanted.image) and torch.equal(latent["samples"], wanted.latent)
        assert loops.shape[0] == 4 and report == wanted.report
        picture, mask = torch.rand(1, 67, 96, 3), torch.zeros(1, 67, 96)
        mask[:, 20:40, 30:60] = 1.0
        image, loops, _, report = LikenessStagedEdit.execute(image=picture, mask=mask, paste=True, **given).result
    assert image.shape == (1, 64, 96, 3) and loops.shape[0] == 4 and "loop 3" in report
    assert torch.equal(image[:, :20], picture[:, :20])
