"""The subject adapter of the small world: its pairs, where its training starts, and its exact widening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from likeness.toyworld import pairs, world
from likeness.toyworld.subjects import for_checking

from .. import inprocess

PROMPT = "a photo of a blue cat in the snow"


@pytest.fixture(scope="module")
def narrow():
    inprocess.start()
    from likeness.toyworld.narrow import load_narrow

    return load_narrow()


def moved_adapter(base) -> dict[str, torch.Tensor]:
    """The published start with every number moved."""
    from likeness.core.ezigen.host.layers import new_adapter

    generator = torch.Generator().manual_seed(3)
    named = new_adapter(base).published_parameters()
    return {k: v.detach() + 0.05 * torch.randn(v.shape, generator=generator) for k, v in named.items()}


def test_pairs_are_of_subjects_that_training_may_see() -> None:
    captions = []
    for seed in range(60):
        scene, picture, mask = pairs.pair(seed)
        idn = scene.identity
        assert not for_checking(idn)
        assert not world.held_out(idn.cls, idn.color, idn.texture, scene.background)
        assert picture.shape == (96, 96, 3) and mask.max() == 255
        assert not np.array_equal(scene.image, picture)
        captions.append(scene.caption)
    assert pairs.pair(7)[0].caption == captions[7]
    background_only = [c for c in captions if c.split()[4] in world.CLASSES]
    assert 5 < len(background_only) < 40  # the class without its colour: the image must tell it


def test_a_subject_is_encoded_alone_on_white(narrow) -> None:
    _, picture, mask = pairs.pair(3)
    alone = pairs.encoded(narrow.vae, picture[None], mask[None], 0)
    whole = pairs.encoded(narrow.vae, picture[None], None, 0)
    assert alone.shape == (1, 4, 12, 12) and not torch.allclose(alone, whole, atol=0.1)
    seen = narrow.vae.decode(alone.float() / 0.18215)
    assert float(seen[0, [0, 0, -1, -1], [0, -1, 0, -1]].min()) > 0.85


def test_the_start_changes_little(narrow) -> None:
    from likeness.core.ezigen.adapter import batch_tokens
    from likeness.core.ezigen.host.layers import UNet, new_adapter
    from likeness.toyworld.train_adapter import split_parameters, start_gently

    base = narrow.model.model
    latents, context = torch.randn(2, 4, 12, 12), narrow.encode(PROMPT).expand(2, -1, -1)
    times, differences = torch.tensor([300.0, 700.0]), []
    with torch.no_grad():
        for gently in (False, True):
            adapter = new_adapter(base)
            if gently:
                start_gently(adapter)
            network = UNet(base, adapter)
            tokens = batch_tokens(network.capture(latents[:1], times[:1], context[:1]), [1])
            found = network.predicted_noise(latents, times, context, tokens)
            differences.append(float((found - base.diffusion_model(latents, times, context=context)).norm()))
    assert differences[1] < 0.5 * differences[0]
    matrices, rest = split_parameters(adapter)
    assert len(matrices) == 4 * 7 and len(matrices) + len(rest) == len(adapter.published_parameters())


def test_the_wide_adapter_computes_the_same(narrow, tmp_path: Path) -> None:
    import comfy.sd

    from likeness.core.ezigen.artifact import StoredAdapter
    from likeness.core.ezigen.host.adapter import encode_subject, with_adapter
    from likeness.toyworld.build import build_checkpoint
    from likeness.toyworld.widen import widen_adapter

    path = build_checkpoint(tmp_path / "wide.safetensors")
    with torch.inference_mode():
        wide = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False, output_vae=False)[0]
        small = {name: value.half().float() for name, value in moved_adapter(narrow.model.model).items()}
        picture = torch.rand(1, 96, 96, 3, generator=torch.Generator().manual_seed(1))
        rows = narrow.encode(PROMPT)
        found = []
        for model, tensors, context in (
            (narrow.model, small, rows),
            (wide, widen_adapter(small), rows.repeat_interleave(8, 2)),
        ):
            subject = encode_subject(model, narrow.vae, [[context, {}]], picture, 5)
            adapted = with_adapter(model, StoredAdapter(tensors), subject)
            found.append(_sampled(adapted, [[context, {}]]))
            plain = _sampled(model, [[context, {}]])
    scale = float(found[0].abs().max())
    assert float((found[0] - found[1]).abs().max()) < 5e-3 * scale
    assert float((found[1] - plain).abs().max()) > 0.1 * scale


def _sampled(model, positive) -> torch.Tensor:
    import comfy.sample

    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return comfy.sample.sample(
        model, noise, 2, 1.0, "euler", "normal", positive, positive, torch.zeros_like(noise), disable_pbar=True, seed=2
    )


def test_the_committed_adapter_knows_subjects_apart_that_it_was_never_trained_on(narrow, monkeypatch) -> None:
    from likeness.toyworld import check_adapter
    from likeness.toyworld.assets import ASSETS

    assert all(for_checking(idn) for idn, _, _ in check_adapter.checked_pairs(16))
    monkeypatch.setattr(check_adapter, "TIMESTEPS", (350, 700))
    found = check_adapter.worth(ASSETS / "adapter.safetensors", 16).values()
    alone, own, other = (sum(part) for part in zip(*found, strict=True))
    assert own < 0.95 * alone and own < 0.8 * other
