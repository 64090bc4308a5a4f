"""The likeness optimisation on tiny models of ComfyUI's own classes: gradient, LoRA in stock nodes, stored runs."""

from __future__ import annotations

import functools

import pytest
import torch

from likeness.core.session.session import Session

from .. import tiny_models
from ..vision.models import clip_folder
from .methods import autoencoder
from .setting import Setting as AnySetting
from .setting import SharedSetting
from .test_contract import Cancelled, forget_runs, own_user_folder  # noqa: F401  (a fixture)

ITERATIONS = 3
Setting = functools.partial(SharedSetting, size=(4, 4))
FAMILIES = ["sd1", "sd2_v", "sdxl", "flux"]


setting_of = functools.cache(Setting)
"""One for all tests that do not change it."""


def sigmas(setting: AnySetting, steps: int = 2) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(setting.model.get_model_object("model_sampling"), "simple", steps)


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny CLIP."""
    from likeness.core.vision.host.vision import load_vision

    folder = tmp_path_factory.mktemp("vision") / "clip"
    clip_folder(folder)
    with torch.inference_mode():
        return load_vision(folder)


def optimised(setting: AnySetting, vision, *, clip=None, background=None, steps=2, rate=0.02, **changes):
    from likeness.core.siso.host.optimize_lora import Generator, Sampling, SisoJob, SisoPlan, optimize_lora
    from likeness.core.siso.host.similarity import Similarity, SimilarityPart
    from likeness.core.siso.siso import SisoSettings

    found = {"seed": 3, "grad_steps": 1, "cfg": 1.0, "iterations": ITERATIONS, "patience": 0, "keep": "best"}
    found |= {"checkpointing": False, "optimizer": "AdamW", "prompt": "a cat", **changes}
    encoder = (clip, found["prompt"])
    generator = Generator(setting.model, autoencoder(setting.channels), setting.source, setting.empty, *encoder)
    similarity = Similarity((SimilarityPart(vision, 1.0, setting.image),))
    latent = torch.zeros_like(setting.latent["samples"][:1])
    sampling = Sampling(latent, sigmas(setting, steps), found["seed"], found["cfg"], found["grad_steps"])
    new_noise = found.get("new_noise", False)
    with torch.inference_mode():
        job = SisoJob(
            generator,
            similarity,
            sampling,
            SisoPlan(found["iterations"], 2, found["keep"], found["checkpointing"], new_noise=new_noise),
            SisoSettings(rate, 0.0, rate, 0.0, patience=found["patience"], optimizer=found["optimizer"]),
            background,
        )
        return optimize_lora(job)


_made: dict[tuple, object] = {}


def made(vision, family: str = "sd1", cfg: float = 1.0, steps: int = 2, grad_steps: int = 1):
    """An optimisation for all tests that only look at it. Whether its run is stored depends on what ran before."""
    case = (family, cfg, steps, grad_steps)
    if case not in _made:
        _made[case] = optimised(setting_of(family), vision, cfg=cfg, steps=steps, grad_steps=grad_steps)
    return _made[case]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pictures_become_more_alike(family, vision):
    found = made(vision, family, 1.0, 1, 1)
    assert found.losses[found.best] < found.losses[0] - 1e-3
    assert found.image.shape == (1, 32, 32, 3) and found.images.shape == (ITERATIONS, 32, 32, 3)
    assert float((found.images[found.best] - found.image[0]).abs().max()) < 1 / 254


def pictured(setting: AnySetting, model, positive, steps: int, seed: int, cfg: float) -> torch.Tensor:
    """What stock sampling and decoding make."""
    import comfy.sample
    import comfy.samplers

    latent = torch.zeros_like(setting.latent["samples"][:1])
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, seed)
        sampler, levels = comfy.samplers.sampler_object("euler"), sigmas(setting, steps)
        samples = comfy.sample.sample_custom(
            model, noise, cfg, sampler, levels, positive, setting.empty, latent, disable_pbar=True, seed=seed
        )
        return autoencoder(setting.channels).decode(samples)


@pytest.mark.parametrize(("cfg", "steps", "grad_steps"), [(1.0, 1, 1), (4.0, 3, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_in_stock_nodes_makes_the_kept_picture(family, cfg, steps, grad_steps, vision, caplog):
    import comfy.sd

    setting, found = setting_of(family), made(vision, family, cfg, steps, grad_steps)
    assert found.best > 0
    with torch.inference_mode():
        tuned, _ = comfy.sd.load_lora_for_models(setting.model, None, found.lora, 1.0, 0.0)
    assert tuned.patches and "not loaded" not in caplog.text
    again = pictured(setting, tuned, setting.source, steps, 3, cfg)
    torch.testing.assert_close(again, found.image, atol=1e-4, rtol=0)
    base = pictured(setting, setting.model, setting.source, steps, 3, cfg)
    assert float((base - found.image).abs().max()) > 1e-3
    assert float((base - found.images[:1]).abs().max()) < 1 / 254


TEXTS = {
    "sd1": ("clip_l_exact", "lora_te_", 0.02),
    "sdxl": ("clip_xl", "lora_te2_", 0.005),
    "flux": ("clip_flux", "text_encoder.", 0.02),
}


@functools.cache
def encoder_of(family: str):
    """One for all tests: none changes it."""
    return getattr(tiny_models, TEXTS[family][0])()


def encoded(clip, text: str = "a cat"):
    """What Text Encode gives."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.mark.parametrize("family", TEXTS)
def test_another_prompt_than_positive_is_refused_before_an_update(family, vision, monkeypatch):
    from likeness.core.session.session import Session
    from likeness.core.siso import siso

    setting, clip = Setting(family), encoder_of(family)
    monkeypatch.setattr(siso.Siso, "update", None)
    setting.source = encoded(clip, "a dog")
    with pytest.raises(ValueError, match="another conditioning of the prompt 'a cat'"):
        optimised(setting, vision, clip=clip)
    monkeypatch.setattr(Session, "run", None)
    with pytest.raises(ValueError, match="'prompt' is empty"):
        optimised(setting, vision, clip=clip, prompt=" ")


@pytest.mark.parametrize("family", TEXTS)
def test_the_text_encoder_learns_too(family, vision, caplog):
    import comfy.sd

    _, prefix, rate = TEXTS[family]
    setting, clip = Setting(family), encoder_of(family)
    setting.source = encoded(clip)
    found = optimised(setting, vision, clip=clip, steps=1, rate=rate, iterations=3)
    text = [name for name in found.lora if name.startswith(prefix)]
    ups = [name for name in text if ".lora_up." in name or ".lora_B." in name]
    assert ups and any(float(found.lora[name].abs().max()) > 0 for name in ups)
    with torch.inference_mode():
        tuned, encoder = comfy.sd.load_lora_for_models(setting.model, clip, found.lora, 1.0, 1.0)
        positive = encoder.encode_from_tokens_scheduled(encoder.tokenize("a cat"))
    assert tuned.patches and encoder.patcher.patches and "not loaded" not in caplog.text
    again = pictured(setting, tuned, positive, 1, 3, 1.0)
    torch.testing.assert_close(again, found.image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing_but_the_cost(family, vision):
    clip, setting = tiny_models.clip_l() if family == "sd1" else None, Setting(family)
    if clip is not None:
        setting.source = encoded(clip)
    plain, cheap = (
        optimised(setting, vision, clip=clip, steps=2, grad_steps=2, iterations=2, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert plain.losses == pytest.approx(cheap.losses, abs=1e-6) and plain.best == cheap.best > 0
    torch.testing.assert_close(plain.images, cheap.images, atol=1 / 254, rtol=0)


def hooked(setting: AnySetting, vision) -> int:
    """How many hooks there are on all models' layers."""
    parts = [setting.model.model, autoencoder().first_stage_model, vision.model]
    layers = [layer for part in parts for layer in part.modules()]
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers)


def test_the_model_stays_as_it_is(vision):
    setting = Setting(shared=False)
    weights = {name: value for name, value in setting.model.model.named_parameters()}
    before = pictured(setting, setting.model, setting.source, 2, 0, 1.0)
    vision.encode_image(setting.image)  # transformers has hooks of its own from the first use on
    hooks = hooked(setting, vision)
    optimised(setting, vision, iterations=2)
    assert torch.equal(before, pictured(setting, setting.model, setting.source, 2, 0, 1.0))
    assert all(value is weights[name] for name, value in setting.model.model.named_parameters())
    assert hooked(setting, vision) == hooks


def equal(a, b) -> bool:
    return a.losses == b.losses and torch.equal(a.image, b.image) and same(a.lora, b.lora)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_cancelled_it_goes_on_and_finished_it_is_not_made_again(vision, tmp_path, monkeypatch):
    from likeness.core.session.progress import Progress
    from likeness.core.session.session import Session

    whole = made(vision)
    forget_runs(tmp_path)
    update = Progress.update

    def cancel(self, losses, denoised=None, image=None):
        assert image.shape == (3, 32, 32)
        if len(losses) == 2:
            raise Cancelled
        update(self, losses, denoised, image)

    monkeypatch.setattr(Progress, "update", cancel)
    with pytest.raises(Cancelled):
        optimised(setting_of(), vision)
    monkeypatch.setattr(Progress, "update", update)
    resumed = optimised(setting_of(), vision)
    assert equal(whole, resumed) and torch.equal(whole.images, resumed.images)
    monkeypatch.setattr(Session, "run", None)
    assert equal(whole, optimised(setting_of(), vision))
    fewer = optimised(setting_of(), vision, iterations=2)
    assert equal(whole, fewer), "what is there is given at once"


def test_with_new_noise_each_image_has_its_own_also_after_a_stop(vision, tmp_path, monkeypatch):
    from likeness.core.session.progress import Progress

    one, whole = (optimised(setting_of(), vision, rate=1e-9, iterations=3, new_noise=new) for new in (False, True))
    assert torch.equal(one.images[0], whole.images[0]), "the first has the seed's"
    assert float((one.images[0] - one.images[2]).abs().max()) < 1 / 254
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((whole.images[first] - whole.images[second]).abs().max()) > 0.1
    patient = optimised(setting_of(), vision, seed=4, patience=1, rate=1e-9, iterations=3, new_noise=True)
    assert whole.keep == "last" and len(patient.losses) == 3
    forget_runs(tmp_path)

    def cancel(self, losses, denoised=None, image=None):
        if len(losses) == 2:
            raise Cancelled

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", cancel)
        with pytest.raises(Cancelled):
            optimised(setting_of(), vision, rate=1e-9, iterations=3, new_noise=True)
    assert torch.equal(whole.images, optimised(setting_of(), vision, rate=1e-9, iterations=3, new_noise=True).images)


def test_prodigy_goes_on_exactly_where_it_was_stopped(vision, tmp_path, monkeypatch):
    from likeness.core.session.progress import Progress

    inputs = {"optimizer": "Prodigy", "rate": 1.0, "iterations": 5, "keep": "last", "steps": 1}
    whole = optimised(setting_of(), vision, **inputs)
    assert len(set(whole.losses)) > 2, "it moves"
    forget_runs(tmp_path)

    def cancel(self, losses, denoised=None, image=None):
        if len(losses) == 3:
            raise Cancelled

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "update", cancel)
        with pytest.raises(Cancelled):
            optimised(setting_of(), vision, **inputs)
    assert equal(whole, optimised(setting_of(), vision, **inputs))


def test_prodigy_that_is_not_installed_is_said_before_work_starts(vision, monkeypatch):
    import sys

    from likeness.core.session.session import Session

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    monkeypatch.setattr(Session, "run", None)
    with pytest.raises(RuntimeError, match="pip install prodigyopt"):
        optimised(Setting(), vision, optimizer="Prodigy", rate=1.0)


def test_it_ends_by_itself_and_is_not_begun_again(vision, monkeypatch):
    from likeness.core.session.session import Session

    found = optimised(setting_of(), vision, rate=1e-9, patience=2, iterations=20)
    assert len(found.losses) == 3
    monkeypatch.setattr(Session, "run", None)
    assert equal(found, optimised(setting_of(), vision, rate=1e-9, patience=2, iterations=20))


def test_another_seed_or_reference_is_another_run(vision):
    first = optimised(setting_of(), vision, iterations=2, steps=1)
    assert not equal(first, optimised(setting_of(), vision, iterations=2, steps=1, seed=4))
    other = Setting()
    other.image = other.image.flip(0, 1, 2)
    assert not equal(first, optimised(other, vision, iterations=2, steps=1))
    assert not same(first.lora, optimised(setting_of(), vision, iterations=2, steps=1, keep="last").lora)


def test_the_background_stays(vision):
    from likeness.core.siso.host.background import Background

    setting = setting_of()
    source = pictured(setting, setting.model, setting.source, 1, 3, 1.0)
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1

    def error(weight: float) -> float:
        keep = Background(source, mask, weight)
        found = optimised(setting, vision, background=keep, steps=1, iterations=5, keep="last")
        assert len(found.parts[0]) == 2
        return float((found.images[-1:] - source)[:, 16:].square().mean())

    assert error(100.0) < 0.7 * error(0.0)


def test_the_gradient_is_that_of_finite_differences(vision, monkeypatch):
    """Of the whole way: LoRA, sampling, decoder, vision model; all numbers moved a little along the gradient."""
    from likeness.core.siso import siso

    found = []
    update = siso.Siso.update

    def compared(self):
        if self.step == 2:  # B is not zero any more
            leaves = list(self.parameters.values())
            gradient = torch.autograd.grad(sum(term(self.generate()) for term in self.terms), leaves)
            steepness = float(torch.stack([part.square().sum() for part in gradient]).sum().sqrt())

            def loss(amount: float) -> float:
                with torch.no_grad():
                    for leaf, part in zip(leaves, gradient, strict=True):
                        leaf += amount / steepness * part
                    value = sum(float(term(self.generate())) for term in self.terms)
                    for leaf, part in zip(leaves, gradient, strict=True):
                        leaf -= amount / steepness * part
                return value

            step = 2e-5 / steepness  # random decoders have a kink at every saturated pixel: longer steps cross many
            found.extend([steepness, (loss(step) - loss(-step)) / (2 * step)])
        return update(self)

    monkeypatch.setattr(siso.Siso, "update", compared)
    optimised(setting_of(), vision, steps=2, grad_steps=2, iterations=3)
    gradient, difference = found
    assert gradient == pytest.approx(difference, rel=0.01)


REFUSED = {
    "no weight": ({"weight": 0.0}, "no part with a weight"),
    "too many gradient steps": ({"grad_steps": 3}, "grad_steps is 3"),
    "cfg without a negative": ({"cfg": 3.0, "empty": None}, "no negative prompt"),
    "new noise for an inverted image": ({"inverted": True}, "set noise to 'same'"),
    "a mask over everything": ({"mask": torch.ones(1, 32, 32)}, "covers the whole image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_work_starts(case, vision, monkeypatch):
    from likeness.core.inversion.renoise import Replay
    from likeness.core.siso.host import optimize_lora as host
    from likeness.core.siso.host.similarity import Similarity, SimilarityPart
    from likeness.core.siso.siso import SisoSettings

    changes, message = REFUSED[case]
    monkeypatch.setattr(Session, "run", None)
    setting = Setting()
    generator = host.Generator(setting.model, autoencoder(), setting.source, changes.get("empty", setting.empty))
    latent = torch.zeros_like(setting.latent["samples"])
    replay = Replay(sigmas(setting), latent[:0]) if "inverted" in changes else None
    sampling = host.Sampling(latent, sigmas(setting), 0, changes.get("cfg", 1.0), changes.get("grad_steps", 1), replay)
    plan = host.SisoPlan(new_noise=replay is not None)
    background = host.Background(setting.image, changes["mask"], 1.0) if "mask" in changes else None
    similarity = Similarity((SimilarityPart(vision, changes.get("weight", 1.0), setting.image),))
    with pytest.raises(ValueError, match=message):
        host.optimize_lora(host.SisoJob(generator, similarity, sampling, plan, SisoSettings(), background))


def test_the_artifact_tells_where_it_comes_from(vision):
    from likeness.core.siso.host.background import background

    found = optimised(setting_of(), vision, iterations=3, steps=1)
    header = found.lora.header
    assert header["method"] == "siso" and header["base"] and header["settings"]["rank"] == 2
    assert f"best: iteration {found.best + 1} of 3" in found.report()
    assert background(None, None, 1.0) is None
    with pytest.raises(ValueError, match="mask was connected without an image"):
        background(None, torch.zeros(1, 64, 64), 1.0)
