"""Fine-tunes with a text encoder that trains too."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from .. import tiny_models
from .fine_tunes import encode, same, train
from .methods import run_node, sine_inputs
from .setting import SharedSetting as Setting

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.mark.parametrize("layer", [None, -2])
def test_the_text_encoder_in_the_session_says_what_text_encode_says(clip, layer):
    from likeness.core.session.differentiable import TextEncoder
    from likeness.tests.gradients import differentiable

    clip = clip.clone()
    if layer is not None:
        clip.clip_layer(layer)
    text = "photo of a (sks:1.3) dog, " + "very " * 90
    ((rows, options),) = encode(clip, text)
    encoder = TextEncoder(clip)
    with differentiable(clip.patcher):
        prompt = encoder.encode(encoder.tokens(text))
    assert rows.shape[1] == 154 and torch.equal(prompt.context.detach(), rows)
    assert torch.equal(prompt.pooled.detach(), options["pooled_output"])


def test_the_text_encoder_trains_too_and_comes_back_as_it_was(clip):
    setting = Setting()
    before, weights = encode(clip, "a dog")[0][0], dict(clip.cond_stage_model.named_parameters())
    model, tuned, lora, _ = train(setting, clip=clip, steps=2)
    assert any(name.startswith("text_encoders.clip_l.") for name in lora)
    assert torch.equal(before, encode(clip, "a dog")[0][0])
    assert all(value is weights[name] for name, value in clip.cond_stage_model.named_parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in clip.cond_stage_model.modules())
    after = encode(tuned, "a dog")[0][0]
    assert float((after - before).abs().mean()) > 1e-4
    frozen = train(setting, positive=encode(clip, "photo of a sks dog"), steps=1)
    assert not any(name.startswith("text_encoders") for name in frozen[2])
    assert frozen[3]["loss"][0] == pytest.approx(train(setting, clip=clip, steps=2)[3]["loss"][0], abs=1e-6)


def test_all_weights_of_the_text_encoder_train_too_and_come_back_as_they_were(clip):
    setting = Setting()
    before, weights = encode(clip, "a dog")[0][0], dict(clip.cond_stage_model.named_parameters())
    _, tuned, lora, _ = train(setting, clip=clip, method="full weights", learning_rate=1e-3, steps=1)
    assert "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.diff" in lora
    assert all(value is weights[name] for name, value in clip.cond_stage_model.named_parameters())
    assert torch.equal(before, encode(clip, "a dog")[0][0])
    assert float((encode(tuned, "a dog")[0][0] - before).abs().mean()) > 1e-4


def test_asking_for_more_steps_goes_on_exactly(clip, tmp_path):
    setting = Setting()
    whole = train(setting, clip=clip, steps=2)
    for path in (tmp_path / "user").glob("likeness/*/*"):
        path.unlink()
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = sine_inputs(setting, clip=clip)
    del inputs["positive"]
    run_node(LikenessFineTune, **{**inputs, "steps": 1})
    assert same(train(setting, clip=clip, steps=2)[2], whole[2])


def test_sdxl_trains_both_text_encoders_and_the_pooled_vector():
    setting, clip = Setting("sdxl"), tiny_models.clip_xl()
    text = "photo of a sks dog"
    _, _, lora, loss = train(setting, clip=clip, steps=1)
    for part in ("clip_l", "clip_g"):
        ups = [value for name, value in lora.items() if f".{part}." in name and name.endswith("lora_up.weight")]
        assert ups and any(bool(value.any()) for value in ups)
    frozen = train(setting, positive=encode(clip, text), steps=1)
    assert frozen[3]["loss"][0] == pytest.approx(loss["loss"][0], abs=1e-5)


def test_prior_pictures_use_the_text_encoder_too(clip):
    setting = Setting()
    image = 1 - setting.image
    plain = train(setting, clip=clip, steps=1)
    prior = {"clip": clip, "prior_weight": 1.0, "prior_image": image}
    one, two = (train(setting, **prior, prior_prompt=words, steps=1) for words in ("photo of a dog", "photo of a cat"))
    assert one[3]["loss"][0] > plain[3]["loss"][0] and not same(one[2], two[2])


def test_one_encoder_is_loaded_and_trained_where_a_fixed_clone_is_a_copy(clip, monkeypatch):
    """As under dynamic VRAM, where a fixed clone has weights of its own."""
    import folder_paths

    from likeness.core.session import differentiable

    expected = train(Setting(), clip=clip, steps=1)
    for path in Path(folder_paths.get_user_directory()).glob("likeness/*/*.safetensors"):
        path.unlink()
    made = []

    def copied(patcher):
        clone = patcher.clone()
        clone.model = copy.deepcopy(patcher.model)
        made.append(clone)
        return clone

    monkeypatch.setattr(differentiable, "fixed_clone", copied)
    again = train(Setting(), clip=clip, steps=1)
    assert len(made) == 1 and same(again[2], expected[2])
