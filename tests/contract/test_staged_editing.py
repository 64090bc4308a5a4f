"""EZIGen's editing on a tiny model: the background stays, the place of the mask changes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from likeness.core.ezigen.staged import Loops

from .. import tiny_models
from .methods import autoencoder
from .setting import SharedSetting as Setting
from .test_adapter import stored, subject

STEPS = 5
SOURCE = torch.nn.functional.interpolate(
    torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(6)), size=(64, 96), mode="bilinear"
).movedim(1, -1)
MASK = torch.zeros(1, 64, 96)
MASK[:, 16:48, 24:72] = 1.0


@pytest.fixture(scope="module")
def parts():
    setting = Setting()
    return setting, stored(setting.model), subject(setting)


def edited(parts, source=SOURCE, mask=MASK, about=None, vae=None, **changes):
    from likeness.core.ezigen.host import staged_edit as host

    setting, adapter, own = parts
    inputs = setting.model, vae or autoencoder(), adapter, about or own, setting.target, setting.empty
    edit = host.StagedEdit(*inputs, seed=7, steps=STEPS, loops=Loops(1, 1))
    with torch.inference_mode():
        image, images, latent, report = host.edit_staged(replace(edit, **changes), source, mask)
    return SimpleNamespace(image=image, images=images, latent=latent["samples"], report=report)


@pytest.fixture(scope="module")
def plain(parts):
    """The edit as it is."""
    return edited(parts)


@pytest.fixture(scope="module")
def published(parts):
    """As the reference code makes it."""
    return edited(parts, published=True)


def outside(latent: torch.Tensor) -> torch.Tensor:
    """The latent's cells that the mask does not touch."""
    away = torch.ones(8, 12, dtype=torch.bool)
    away[1:7, 2:10] = False
    return latent[..., away]


def test_the_background_is_the_source_and_the_place_is_not(parts, plain):
    with torch.inference_mode():
        source = autoencoder().encode(SOURCE)
    found = plain
    torch.testing.assert_close(outside(found.latent), outside(source), atol=1e-4, rtol=1e-4)
    inside = (found.latent - source)[..., 2:6, 3:9]
    assert float(inside.abs().max()) > 0.1
    assert found.image.shape == SOURCE.shape and len(found.images) == 2
    other = edited(parts, about=subject(parts[0], 1))
    assert float((other.latent - found.latent)[..., 2:6, 3:9].abs().max()) > 1e-4
    assert torch.equal(outside(other.latent), outside(found.latent))


def test_the_published_background_is_a_noisy_one(published):
    with torch.inference_mode():
        source = autoencoder().encode(SOURCE)
    assert float((outside(published.latent) - outside(source)).abs().max()) > 1e-2


def test_every_loop_keeps_the_first_background(parts):
    found = edited(parts, loops=Loops(3, 3))
    with torch.inference_mode():
        source = autoencoder().encode(SOURCE)
    assert len(found.images) == 4 and "loop 3" in found.report
    torch.testing.assert_close(outside(found.latent), outside(source), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.latent, edited(parts, loops=Loops(3, 3)).latent)
    assert not parts[0].model.wrappers.get("sampler_sample")


def test_soft_masks_and_pasted_pixels(parts, plain, published):
    soft = MASK.clone()
    soft[:, 8:16] = 0.5
    assert not torch.equal(edited(parts, mask=soft).latent, plain.latent)
    assert torch.equal(edited(parts, mask=soft, published=True).latent, published.latent)
    pixels = edited(parts, paste=True).image
    assert torch.equal(pixels[:, :16], SOURCE[:, :16])
    assert torch.equal(pixels[:, 16:48, 24:72], plain.image[:, 16:48, 24:72])


def test_a_white_mask_of_another_size_is_white_as_published_too(parts, plain):
    """Scaling leaves a little less than 1 of it."""
    small, large = (edited(parts, mask=torch.ones(1, *size), published=True).latent for size in ((64, 96), (100, 150)))
    assert torch.equal(small, large)
    grey = torch.full((1, 64, 96), 0.9)
    assert not torch.equal(edited(parts, mask=grey).latent, plain.latent)
    with pytest.raises(ValueError, match="only white counts"):
        edited(parts, mask=grey, published=True)


def test_the_published_prompt_is_one_token_without_positions(clip):
    """The text encoder itself, with a table of zeros in place of its positions."""
    from likeness.core.ezigen.host.staged_edit import published_prompt

    with torch.inference_mode():
        ((found, _),) = published_prompt(clip)
        table = clip.cond_stage_model.clip_l.transformer.text_model.embeddings.position_embedding
        before = table.weight.clone()
        table.weight.zero_()
        ((expected, _),) = clip.encode_from_tokens_scheduled({"l": [[(7788, 1.0)] * 77]})
        table.weight.copy_(before)
        ((other, _),) = clip.encode_from_tokens_scheduled({"l": [[(7788, 1.0)] * 77]})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == (1, 77, 768) and float((found - other).abs().max()) > 0.1


def test_the_inversion_has_a_prompt_of_its_own(parts, plain, clip, monkeypatch):
    from likeness.core.ezigen.host.staged_edit import published_prompt

    setting = parts[0]
    usual, other = plain.latent, edited(parts, inversion_prompt=setting.source).latent
    assert torch.equal(edited(parts, inversion_prompt=setting.empty).latent, usual)
    assert not torch.equal(other, usual)
    with torch.inference_mode():
        published = published_prompt(clip)
    assert torch.equal(edited(parts, clip=clip).latent, edited(parts, inversion_prompt=published).latent)
    with pytest.raises(ValueError, match="expected one of them"):
        edited(parts, inversion_prompt=setting.source, clip=clip)
    narrow = {"hidden_size": 64, "num_attention_heads": 2}
    monkeypatch.setattr(tiny_models, "FEW", {**tiny_models.FEW, **narrow})
    with pytest.raises(ValueError, match="has 2 tables of positions, expected one"):
        edited(parts, clip=tiny_models.clip_xl())


def test_a_step_leaves_the_noise_of_its_level(parts):
    """With a perfect denoiser, on the CPU."""
    from likeness.core.ezigen.host.staged_edit import _PastingSampler

    sigmas, z, found = torch.tensor([1.1, 0.9, 0.7, 0.5, 0.3, 0.0]), torch.rand(1, 4, 64, 64), []
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))

    def perfect(x, sigma, **_more):
        found.append(float((x - z).std() / sigma[0]))
        return z

    settings = SimpleNamespace(seed=7, published=False)
    run = _PastingSampler([z] * 6, torch.ones(1, 1, 64, 64), settings, 1, SimpleNamespace(step=lambda: None))
    result = run.sample(perfect, sigmas, {}, None, z + sigmas[0] * noise)
    assert len(found) == 5 and all(abs(part - 1.0) < 0.02 for part in found), found
    torch.testing.assert_close(result, z)


def test_a_large_picture_is_warned_of(parts, caplog, monkeypatch):
    from likeness.core.ezigen.host import staged as staged_sampling

    monkeypatch.setattr(staged_sampling, "LARGE", 56)
    edited(parts, loops=Loops(0, 0))
    assert "96 x 64 pixels" in caplog.text and "512 on its short side" in caplog.text


def test_what_is_refused(parts):
    with pytest.raises(ValueError, match="have 16 channels, the model's 4"):
        edited(parts, vae=autoencoder(16))
    with pytest.raises(ValueError, match="one image at a time"):
        edited(parts, source=SOURCE.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="mask is empty"):
        edited(parts, mask=0 * MASK)
    with pytest.raises(ValueError, match="another proportion"):
        edited(parts, mask=MASK[:, :, :64])
    with pytest.raises(ValueError, match="connect a CLIP_VISION"):
        edited(parts, loops=Loops(1, 3))
