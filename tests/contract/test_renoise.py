"""ReNoise inversion in ComfyUI: stock samplers come back to the image in a few steps, and edits start from it."""

from __future__ import annotations

import functools

import pytest
import torch

from likeness.core.session.session import Session

from .. import tiny_models
from .calm import calm, calmed
from .methods import Setting, autoencoder, run_node
from .test_contract import Cancelled, own_user_folder  # noqa: F401  (a fixture)
from .test_likeness_optimisation import vision  # noqa: F401  (a fixture)

KINDS = ("euler_ancestral", "euler")


def sigmas(setting: Setting, steps: int = 4, first: int = 1) -> torch.Tensor:
    """What BasicScheduler and SplitSigmas give."""
    import comfy.samplers

    sampling = setting.model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)[first:]


def invert(setting: Setting, **changes):
    """What a random network predicts is not like noise, so it is not made so, unless asked for."""
    from likeness.nodes.inversion import LikenessRenoise

    inputs = {"model": setting.model, "positive": setting.source, "latent": setting.latent, "sigmas": sigmas(setting)}
    inputs |= {"kl_weight": 0.0, "correlation_weight": 0.0}
    return run_node(LikenessRenoise, **{**inputs, "sampler": "euler_ancestral", "seed": 3, **changes})[:4]


@functools.cache
def _inverted(family: str, kind: str) -> tuple:
    return invert(calmed(family), sampler=kind)


def inverted(family: str = "sd1", kind: str = "euler_ancestral") -> tuple:
    """A calm network's setting and the inversion of its image, made once: latent, sampler, levels, report."""
    return calmed(family), *_inverted(family, kind)


def play(setting: Setting, start: dict, sampler, levels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """SamplerCustomAdvanced with DisableNoise and BasicGuider."""
    from comfy_extras import nodes_custom_sampler as stock

    (noise,) = run_node(stock.DisableNoise)
    (guider,) = run_node(stock.BasicGuider, model=setting.model, conditioning=setting.source)
    advanced = stock.SamplerCustomAdvanced
    return run_node(advanced, noise=noise, guider=guider, sampler=sampler, sigmas=levels, latent_image=start)[0][
        "samples"
    ]


def missed(setting: Setting, found: torch.Tensor) -> float:
    wanted = setting.latent["samples"]
    return float((found - wanted).norm() / wanted.norm())


ELSEWHERE = [pytest.param(name, "euler", marks=pytest.mark.slow) for name in ("sd2_v", "sdxl")]


@pytest.mark.parametrize(
    ("family", "kind"), [*((name, "euler_ancestral") for name in tiny_models.FAMILIES), ("sd1", "euler"), *ELSEWHERE]
)
def test_a_stock_sampler_comes_back_to_the_picture(family, kind):
    setting, start, sampler, levels, report = inverted(family, kind)
    found = play(setting, start, sampler, levels)
    assert missed(setting, found) < (0.2 if family == "sd2_v" else 0.01)
    assert f"missed by {100 * missed(setting, found):.1f} %" in report and report.startswith("3 ")
    assert len(start["likeness_replay"].noises) == (3 if kind == "euler_ancestral" else 0)
    assert missed(setting, start["samples"]) > 0.3


def test_without_the_recorded_noises_it_goes_astray_and_with_them_any_seed_is_the_same():
    import comfy.samplers

    setting, start, sampler, levels, _ = inverted()
    first, second = (play(setting, start, sampler, levels, seed) for seed in (0, 1))
    assert torch.equal(first, second)
    plain = play(setting, start, comfy.samplers.sampler_object("euler_ancestral"), levels)
    assert missed(setting, plain) > 3 * missed(setting, first)


def test_each_step_is_led_back_by_its_noise():
    """Without the correction a step that is not inverted exactly stays astray."""
    from likeness.core.inversion import renoise

    setting = Setting()  # a network that says much
    errors = {}
    for length in (0.0, renoise.CORRECTION_LENGTH):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(renoise, "CORRECTION_LENGTH", length)
            start, sampler, levels, _ = invert(setting)
        errors[length] = missed(setting, play(setting, start, sampler, levels))
    assert errors[renoise.CORRECTION_LENGTH] < 0.9 * errors[0.0]


def test_predictions_are_made_to_look_like_noise():
    """Their patches come nearer to those of predictions for really noised latents, and neighbours less alike."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        from likeness.core.inversion import renoise

        regularize = renoise.regularize

        def compared(eps, like, generator, *weights):
            after = regularize(eps, like, generator, *weights)
            found.append([renoise.patch_kl(eps, like), renoise.patch_kl(after, like)])
            return after

        patch.setattr(renoise, "regularize", compared)
        setting = Setting()
        assert bool(torch.isfinite(invert(setting, kl_weight=0.01)[0]["samples"]).all())
    assert len(found) == 2 * 3 + 5 + 1 and all(float(after) < float(before) for before, after in found)


def test_a_correction_that_runs_away_is_said():
    with pytest.raises(ValueError, match="ran away"):
        invert(calmed(), kl_weight=0.065, correlation_weight=20.0)


def test_it_is_the_same_again_and_the_model_and_the_random_numbers_stay():
    setting = calmed()
    levels = sigmas(setting, 3)
    weights = {name: value for name, value in setting.model.model.named_parameters()}
    state = torch.get_rng_state()
    first, second = (invert(setting, sigmas=levels)[0] for _ in range(2))
    assert torch.equal(first["samples"], second["samples"])
    assert torch.equal(first["likeness_replay"].noises, second["likeness_replay"].noises)
    assert not torch.equal(first["samples"], invert(setting, sigmas=levels, seed=4)[0]["samples"])
    assert torch.equal(state, torch.get_rng_state())
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())


def test_a_picture_of_an_odd_size_and_all_levels():
    setting = calm(Setting(size=(9, 7)))
    start, sampler, levels, _ = invert(setting, sigmas=sigmas(setting, 2, 0))
    assert start["samples"].shape == (1, 4, 9, 7) and len(levels) == 3
    assert bool(torch.isfinite(play(setting, start, sampler, levels)).all())


def test_an_image_is_encoded():
    setting = calmed()
    levels = sigmas(setting, 2)
    by_image = invert(setting, latent=None, image=setting.image, vae=autoencoder(), sigmas=levels)[0]
    with torch.inference_mode():
        encoded = {"samples": autoencoder().encode(setting.image)}
    assert torch.equal(by_image["samples"], invert(setting, latent=encoded, sigmas=levels)[0]["samples"])


def test_cancelled_it_stops_at_once(monkeypatch):
    import comfy.model_management as mm

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 4:
            raise Cancelled

    setting = Setting()
    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(Cancelled):
        invert(setting)
    assert len(calls) == 4


REFUSED = {
    "rising levels": ({"sigmas": torch.tensor([0.0, 1.0])}, "do not flip"),
    "levels that end in noise": ({"sigmas": torch.tensor([4.0, 1.0])}, "still noisy"),
    "two images": ({"latent": {"samples": torch.zeros(2, 4, 8, 8)}}, "ImageFromBatch"),
    "no image": ({"latent": None}, "Connect either a LATENT"),
    "another model's latent": ({"latent": {"samples": torch.zeros(1, 16, 8, 8)}}, "use its own VAE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_inverted_is_refused_before_work_starts(case, monkeypatch):
    from likeness.core.inversion.host import renoise

    changes, message = REFUSED[case]
    monkeypatch.setattr(renoise, "predicting", None)
    with pytest.raises(ValueError, match=message):
        invert(calmed(), **changes)


def test_other_levels_than_the_inversions_are_refused():
    setting, start, sampler, *_ = inverted()
    with pytest.raises(ValueError, match="connect the SIGMAS of Invert For Few Steps"):
        play(setting, start, sampler, sigmas(setting, 5))


def edited(setting: Setting, seen, start: dict, levels: torch.Tensor, background=None, **changes):
    from likeness.core.inversion.host.renoise import replay_of
    from likeness.core.siso.host.optimize_lora import Generator, Sampling, SisoJob, SisoPlan, optimize_lora
    from likeness.core.siso.host.similarity import Similarity, SimilarityPart
    from likeness.core.siso.siso import SisoSettings

    found = {"iterations": 3, "rate": 0.01, "other": setting.image.flip(1), **changes}
    generator = Generator(setting.model, autoencoder(), setting.source)
    with torch.inference_mode():
        job = SisoJob(
            generator,
            Similarity((SimilarityPart(seen, 1.0, found["other"]),)),
            Sampling(start["samples"], levels, 9, replay=replay_of(start)),
            SisoPlan(found["iterations"], 2, "last"),
            SisoSettings(found["rate"], 0.0, patience=0),
            background,
        )
        return optimize_lora(job)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_begins_at_the_inverted_picture(kind, vision):  # noqa: F811
    setting, start, sampler, levels, _ = inverted(kind=kind)
    with torch.inference_mode():
        stock = autoencoder().decode(play(setting, start, sampler, levels))
    found = edited(setting, vision, start, levels, iterations=2)
    assert float((found.images[:1] - stock).abs().max()) < 1 / 254
    assert float((found.images[-1:] - stock).abs().max()) > 1 / 255


def test_the_background_of_an_edit_stays(vision):  # noqa: F811
    from likeness.core.siso.host.background import Background

    setting, start, sampler, levels, _ = inverted()
    with torch.inference_mode():
        source = autoencoder().decode(play(setting, start, sampler, levels))
    mask = torch.zeros(1, 16, 16)  # smaller than the image
    mask[:, :8] = 1

    def error(weight: float) -> float:
        found = edited(setting, vision, start, levels, Background(source, mask, weight), iterations=4)
        return float((found.images[-1:] - source)[:, 32:].square().mean())

    assert error(100.0) < 0.8 * error(0.0)


BACKGROUNDS = {
    "another size": ({"picture": torch.zeros(1, 96, 64, 3)}, "images of 64 x 64 are made"),
    "two images": ({"picture": torch.zeros(2, 64, 64, 3)}, "2 of them"),
    "a mask of another proportion": ({"mask": torch.ones(1, 64, 32)}, "another proportion"),
    "two masks": ({"mask": torch.zeros(2, 64, 64)}, "2 masks came with 1 images"),
    "an empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty.*Open in MaskEditor"),
    "a mask over everything": ({"mask": torch.ones(1, 32, 32)}, "covers the whole image"),
    "a scaled latent": ({"scaled": True, "picture": torch.zeros(1, 128, 128, 3)}, "not sampled, scaled or cut"),
    "other levels": ({"levels": torch.tensor([4.0, 1.0, 0.0])}, "connect the SIGMAS that came with the latent"),
}


@pytest.mark.parametrize("case", BACKGROUNDS)
def test_an_edit_that_does_not_fit_is_refused_before_work_starts(case, vision, monkeypatch):  # noqa: F811
    from likeness.core.session.session import Session
    from likeness.core.siso.host.background import Background

    changes, message = BACKGROUNDS[case]
    monkeypatch.setattr(Session, "run", None)
    setting, start, _, levels, _ = inverted()
    inputs = {"picture": setting.image, "mask": torch.eye(64)[None].cumsum(1), "levels": levels, **changes}
    if "scaled" in changes:
        start = {**start, "samples": start["samples"].repeat(1, 1, 2, 2)}
    keep = Background(inputs["picture"], inputs["mask"], 10.0)
    with pytest.raises(ValueError, match=message):
        edited(setting, vision, start, inputs["levels"], keep)


def test_what_was_sampled_from_an_inverted_latent_is_not_taken_for_it(monkeypatch):
    from likeness.core.inversion.host.renoise import replay_of

    setting, start, sampler, levels, _ = inverted()
    assert replay_of({**start, "samples": start["samples"].clone()}) is start["likeness_replay"]
    assert replay_of({"samples": start["samples"]}) is None
    sampled = {**start, "samples": play(setting, start, sampler, levels)}
    with pytest.raises(ValueError, match="not sampled, scaled or cut"):
        replay_of(sampled)


def test_an_edit_is_computed_as_exactly_as_its_inversion(vision, monkeypatch):  # noqa: F811
    """fp16 models invert in fp16 or fp32: an optimisation in bf16 would begin at another image."""

    def asked(session, _body):
        raise Cancelled(session.exact)

    setting, start, _, levels, _ = inverted()
    monkeypatch.setattr(Session, "run", asked)
    for given, exact in ((start, True), ({"samples": start["samples"]}, False)):
        with pytest.raises(Cancelled) as found:
            edited(setting, vision, given, levels)
        assert found.value.args == (exact,)


def test_the_background_is_compared_where_the_pictures_are(monkeypatch):
    """The VAE may be on another device than the model (--cpu-vae)."""
    from likeness.core.siso.host import background

    seen = []

    def compared(*tensors):
        seen.extend(tensor.device.type for tensor in tensors)
        return tensors[0].sum()

    monkeypatch.setattr(background, "background_error", compared)
    mask = torch.eye(64)[None]
    background.Background(torch.rand(1, 64, 64, 3), mask, 1.0).term()(torch.zeros(1, 3, 64, 64, device="meta"))
    assert seen == ["meta"] * 3
