"""EZIGen in ComfyUI's UNet against the numbers of the authors' UNet, samplers and editing."""

from __future__ import annotations

import pytest
import torch

from likeness.core.ezigen.adapter import Adapter, batch_tokens
from likeness.core.ezigen.artifact import pack_adapter
from likeness.core.ezigen.host.adapter import Subject, with_adapter
from likeness.core.ezigen.host.layers import UNet, places
from likeness.core.ezigen.staged import (
    background_of,
    invert_with_solver,
    paste,
    published_factors,
    published_levels,
    split,
)

from ...tiny_models import CPU
from ..ezigen_numbers import (
    CASES,
    TIMESTEP,
    Official,
    captures_as_published,
    features,
    learns_as_published,
    predicts_as_published,
    relative,
)

LEVELS = {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}


@pytest.fixture(scope="module")
def official() -> Official:
    return Official()


@pytest.fixture(scope="module")
def model(official):
    """The authors' tiny UNet in ComfyUI's own class, as a MODEL."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = {
        **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2] * 4},
        **{"channel_mult": [1, 2, 1, 1], "use_spatial_transformer": True, "context_dim": 16, "num_heads": -1},
        **{"num_head_channels": 8, "transformer_depth_middle": 1, "use_linear_in_transformer": True, "legacy": False},
        **{"use_temporal_attention": False, "adm_in_channels": None, "dtype": torch.float32, **LEVELS},
    }
    names = comfy.utils.unet_to_diffusers(config)
    model_config = comfy.supported_models.SD20(dict(config))
    model_config.unet_config["num_head_channels"] = 8  # the SD20 class sets 64
    weights = {names[key]: value for key, value in official.part("w.").items() if key in names}
    with torch.inference_mode():
        base = comfy.model_base.BaseModel(model_config, device="cpu")
        base.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(base, CPU, CPU)


@pytest.fixture(scope="module")
def adapter(official, model) -> Adapter:
    made = Adapter([place.layer for place in places(model.model)])
    made.load({name: value for name, value in official.part("w.").items() if name in made.published_parameters()})
    return made


@pytest.fixture(scope="module")
def network(model, adapter) -> UNet:
    return UNet(model.model, adapter)


def prompt(rows: torch.Tensor) -> list:
    return [[rows, {}]]


def test_names_and_order(official, model, adapter):
    found = places(model.model)
    assert [place.layer.name.removesuffix(".transformer_blocks.0") for place in found] == official.settings["layers"]
    assert [list(place.key[:2]) for place in found] == official.settings["native"]
    assert len(adapter.published_parameters()) == 113


def test_captured_features(official, network):
    captures_as_published(network, official)


@pytest.mark.parametrize("case", CASES)
def test_forward(official, network, case):
    predicts_as_published(network, official, case)


def test_forward_of_four_subjects(official, network):
    """Four images: joined for one sample, and as a batch with places of which some are not there."""
    timesteps = torch.full((2,), TIMESTEP)
    with torch.inference_mode():
        captured = network.capture(official["i.ref.x"], torch.ones(4), official["i.ref.ctx"])
        found = network.predicted_noise(official["i.x"], timesteps, official["i.ctx"], batch_tokens(captured, [4]))
        assert relative(found, official["o.main.four_subjects"]) < 2e-5
        mixed = [torch.cat([each[:1], each]) for each in captured]  # one image for the first sample, four for the other
        found = network.predicted_noise(official["i.x"], timesteps, official["i.ctx"], batch_tokens(mixed, [1, 4]))
    assert relative(found[:1], official["o.main.subject"][:1]) < 2e-5
    assert relative(found[1:], official["o.main.four_subjects"][1:]) < 2e-5


def test_without_adapter(official, model):
    with torch.inference_mode():
        unet = model.model.diffusion_model
        found = unet(official["i.x"], torch.full((2,), float(TIMESTEP)), context=official["i.ctx"])
    assert relative(found, official["o.main.adapter_off"]) < 2e-5


def test_loss_and_gradients(official, network):
    from likeness.core.session.weights import thawed

    with torch.inference_mode(False), torch.enable_grad(), thawed([network.unet]):
        learns_as_published(network, official)


class Sampling:
    """Sampling of the file's MODEL from given latents, levels and noises, by ComfyUI's own DDPM steps."""

    def __init__(self, official, model, adapter) -> None:
        from likeness.core.session.fingerprint import fingerprint

        self.official, self.model = official, model
        self.stored = pack_adapter(adapter, {})
        self.subject = Subject(features(official), torch.ones(1, 8, 8, 3), fingerprint(model))
        table = model.get_model_object("model_sampling").sigmas
        self.table = table
        self.sigmas = torch.stack([*(table[int(t)] for t in official["i.ddpm_timesteps"]), torch.zeros(())])

    def run(self, model, cfg, x, sigmas, noises, after=lambda step, x: x):
        """x and the result in ComfyUI's coordinates; after(step, x) changes the latent behind each step."""
        import comfy.k_diffusion.sampling
        import comfy.samplers

        given = iter(noises)

        class Sampler(comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
                x = noise
                for step in range(len(sigmas) - 1):
                    x = comfy.k_diffusion.sampling.sample_ddpm(
                        model_wrap, x, sigmas[step : step + 2], extra_args=extra_args, disable=True,
                        noise_sampler=lambda *_levels: next(given)[None],
                    )  # fmt: skip
                    x = after(step, x)
                return x

        guider = comfy.samplers.CFGGuider(model)
        negative, positive = self.official["i.ctx"].split(1)
        guider.set_conds(prompt(positive), prompt(negative))
        guider.set_cfg(cfg)
        found = guider.sample(x, torch.zeros_like(x), Sampler(), sigmas, seed=0, disable_pbar=True)
        return found * model.model.latent_format.scale_factor  # a guider returns latents as the VAE takes them


@pytest.fixture(scope="module")
def sampling(official, model, adapter) -> Sampling:
    return Sampling(official, model, adapter)


def test_generation_and_loop(official, model, sampling):
    """Ten DDPM steps, the last four with the adapter; back up to t = 400, said to be 301; these four again."""
    split_ratio, cfg = official.settings["SPLIT"], official.settings["CFG"]
    with torch.inference_mode():
        whole = sampling.sigmas
        staged = with_adapter(model, sampling.stored, sampling.subject, ratio=split_ratio)
        start = official["i.init"] * (1 + whole[0] ** 2).sqrt()
        initial = sampling.run(staged, cfg, start, whole, official["i.noise.a"])
        assert relative(initial, official["o.gen.initial"]) < 1e-3

        _, levels = split(whole, split_ratio)
        published = sampling.table[400]
        signal, factor = published_factors(float(levels[0]), float(published))
        x = signal * official["o.gen.initial"] + levels[0] * factor * official["i.renoise"]
        assert relative(x / (1 + levels[0] ** 2).sqrt(), official["o.gen.renoised"]) < 1e-5
        looping = with_adapter(model, sampling.stored, sampling.subject)
        loop = sampling.run(looping, cfg, x, levels, official["i.noise.b"])
        assert relative(loop, official["o.gen.loop1"]) < 1e-3


def test_inversion_and_masked_edit(official, model, sampling):
    """Four steps up by DPM-Solver++ with an empty prompt, four DDPM steps down with the background pasted."""
    null, mask = official["i.null"], official["i.mask"]
    levels_up = official["i.inverse_sigmas"][:5]
    torch.testing.assert_close(published_levels(sampling.table, 10)[:5], levels_up, atol=0, rtol=1e-4)
    with torch.inference_mode():
        unet = model.model.diffusion_model

        def predict(x, sigma):
            timestep = model.get_model_object("model_sampling").timestep(sigma).view(1)
            return unet(x / (1 + sigma**2).sqrt(), timestep.float(), context=null)

        start = official["i.src"] * (1 + levels_up[0] ** 2).sqrt()
        trajectory = invert_with_solver(predict, start, levels_up)
        scales = (1 + levels_up**2).sqrt()
        found = torch.cat([x / scale for x, scale in zip(trajectory, scales, strict=True)])
        assert relative(found, official["o.edit.inversion"]) < 1e-3

        _, levels = split(sampling.sigmas, official.settings["SPLIT"])

        def paste_published(step, x):  # the authors paste latents of variance 1, whatever level they are said to be of
            scale = (1 + levels[step + 1] ** 2).sqrt()
            background = background_of(official["o.edit.inversion"][:, None], step, published=True)
            return paste(x, scale * background, mask)

        first = official["o.edit.inversion"][-1:] * (1 + levels[0] ** 2).sqrt()
        editing = with_adapter(model, sampling.stored, sampling.subject)
        cfg = official.settings["CFG_EDIT"]
        edited = sampling.run(editing, cfg, first, levels, official["i.noise.e"], paste_published)
        assert relative(edited, official["o.edit.loop1"]) < 1e-3
