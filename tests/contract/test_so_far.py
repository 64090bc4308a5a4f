"""While an embedding is learned, its node shows the new prompt with the subject so far; the training is as without."""

from __future__ import annotations

import pytest
import torch

from .setting import SharedSetting as Setting
from .test_embedding_nodes import train

pytestmark = pytest.mark.usefixtures("own_folders")


def learned(setting: Setting, monkeypatch, **inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last tokens, and the images that the page got of what was learned so far."""
    from likeness.core.session import progress

    shown: list[torch.Tensor] = []
    original = progress.Progress.update

    def update(self, losses, denoised=None, image=None, so_far=False):
        shown.extend([denoised.clone()] if so_far else [])
        original(self, losses, denoised, image, so_far)

    with monkeypatch.context() as patched:
        patched.setattr(progress, "SHARE", 1e9)  # at every update
        patched.setattr(progress.Progress, "update", update)
        return train(setting, steps=2, preview_steps=0, save_every=2, **inputs)[0].at(2), shown


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_training_is_the_same_to_the_byte(family, monkeypatch, tmp_path):
    import folder_paths

    setting = Setting(family)
    alone, none = learned(setting, monkeypatch)
    folder_paths.set_user_directory(str(tmp_path / "other"))  # so that it is trained again
    beside, shown = learned(setting, monkeypatch, target=setting.target, negative=setting.empty)
    assert torch.equal(alone, beside) and not none and len(shown) == 2
    assert not torch.equal(shown[0], shown[-1]), "what is shown does not follow what is learned"


def test_the_image_is_that_of_a_stock_sampler(monkeypatch):
    """Euler over the same levels, with the tokens of that update; ComfyUI starts a hair above the highest level."""
    import comfy.sample
    import comfy.samplers

    from likeness.core.embedding.host import so_far
    from likeness.core.prompt.conditioning import apply_embedding

    setting = Setting()
    inputs = {"target": setting.target, "negative": setting.empty, "preview_cfg": 3.0, "seed": 5}
    tokens, shown = learned(setting, monkeypatch, **inputs)
    sampling = setting.model.get_model_object("model_sampling")
    timesteps = torch.linspace(len(sampling.sigmas) - 1, 0, so_far.STEPS + 1).round().long()
    sigmas = torch.cat([sampling.sigmas[timesteps[:-1]], torch.zeros(1)])
    noise = torch.randn(shown[-1].shape, generator=torch.Generator().manual_seed(5))
    prompt = apply_embedding(setting.target, tokens, 0.8)
    with torch.inference_mode():
        stock = comfy.sample.sample_custom(
            *(setting.model, noise, 3.0, comfy.samplers.ksampler("euler"), sigmas, prompt, setting.empty),
            latent_image=torch.zeros_like(noise),
            disable_pbar=True,
        )
    latent = setting.model.model.process_latent_out(shown[-1])
    assert (latent - stock).abs().max() < 0.01 * stock.std()


def test_it_takes_a_small_share_of_the_time(monkeypatch):
    from likeness.core.session import progress

    clock, made = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    def make() -> int:
        clock[0] += 2.0
        made.append(clock[0])
        return len(made)

    sparingly = progress.Sparingly(make)
    for _ in range(1000):
        sparingly()
        clock[0] += 1.0
    assert 2.0 * len(made) / clock[0] < 1.2 * progress.SHARE and sparingly() == len(made)
