"""The three fine-tune nodes: text encoders, stock loaders, files, resuming, and what bad input gets."""

from __future__ import annotations

import logging

import pytest
import torch

from .. import tiny_models
from .methods import Setting, autoencoder, fit_sine, run_node, sample, sine_inputs


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    import folder_paths

    folder_paths.set_user_directory(str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


def train(setting: Setting, **changes) -> tuple:
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = sine_inputs(setting, steps=3, **changes)
    if inputs.get("clip") is not None:
        del inputs["positive"]
    return run_node(LikenessFineTune, **inputs)


def encode(clip, text: str) -> list:
    from nodes import CLIPTextEncode

    return run_node(CLIPTextEncode, clip=clip, text=text)[0]


def picture(setting: Setting, model, positive=None) -> torch.Tensor:
    return sample(model, positive or setting.target, setting.empty, setting.latent)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What comes out
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoRA", "full weights"])
def test_the_model_output_is_what_the_artifact_gives(method):
    from likeness.core.host.position_map import position_map_of
    from likeness.core.host.tuned_models import apply_tuned

    setting = Setting()
    model, clip, lora, loss = train(setting, method=method, learning_rate=0.003)
    assert len(loss["loss"]) == 3 and type(clip).__name__ == "ExecutionBlocker"
    found = position_map_of(model)
    assert (found.cells, found.interpolation) == (16, "bilinear") and position_map_of(setting.model) is None
    with torch.inference_mode():
        again, _ = apply_tuned(lora, setting.model, None, 1.0)
    assert torch.equal(picture(setting, model), picture(setting, again))


def test_the_artifact_says_what_it_is():
    lora = train(Setting(), interpolation="nearest", cells=20, whole_image=0.5, mask=torch.ones(1, 64, 64))[2]
    assert lora.position_map == (20, "nearest") and lora.prompt == "photo of a sks dog"
    header = lora.header
    assert header["method"] == "sine" and header["base"]["family"] == "SD15" and len(header["losses"]) == 3
    expected = {"steps": 3, "rank": 4, "resolution": 64, "whole_image": 0.5, "masked": True, "pictures": 1}
    assert expected.items() <= header["settings"].items()
    plain = train(Setting(), patches=False)[2]
    assert plain.position_map is None and plain.header["settings"]["recon_weight"] == 0.0


def test_without_patches_every_picture_is_seen_whole():
    setting = Setting(images=3)
    _, _, lora, loss = train(setting, patches=False)
    assert len(loss["loss"]) == 3
    first = Setting()
    first.image = setting.image[:1]
    assert not same(lora, train(first, patches=False)[2])


def test_a_map_that_already_lies_on_the_model_is_kept_by_training_without_patches():
    from likeness.core.host.position_map import with_position_map

    setting = Setting()
    with torch.inference_mode():
        setting.model = with_position_map(setting.model, 24, "nearest")
    assert train(setting, patches=False)[2].position_map == (24, "nearest")


def test_inputs_decide_the_result_and_checkpointing_does_not(tmp_path):
    plain, count = train(Setting()), 1
    files = lambda: len(list((tmp_path / "user" / "likeness" / "runs").iterdir()))  # noqa: E731
    assert files() == count
    checkpointed = train(Setting(), checkpointing=True)
    assert files() == count and same(plain[2], checkpointed[2])
    other_picture = Setting()
    other_picture.image = 1 - other_picture.image
    changes = [
        {"patches": False},
        {"rank": 2},
        {"resolution": 72},
        {"seed": 1},
        {"whole_image": 0.9},
        {"recon_weight": 0.0},
        {"cells": 20},
        {"interpolation": "nearest"},
        {"crops": 2},
        {"learning_rate": 0.01},
        {"positive": Setting().target},
        {"image": other_picture.image},
        {"prior_weight": 0.5, "prior_image": other_picture.image, "prior_positive": Setting().empty},
        {"vae": tiny_models.taesd(seed=3)},
    ]
    for change in changes:
        _, _, lora, loss = train(Setting(), **change)
        count += 1
        assert files() == count and (not same(lora, plain[2]) or loss != plain[3]), change


def test_checkpointing_gives_the_same_weights():
    from likeness.core.host import fine_tuning

    first = train(Setting(), patches=True)[2]
    for path in fine_tuning.Path(fine_tuning.folder_paths.get_user_directory()).glob("likeness/*/*"):
        path.unlink()
    assert same(first, train(Setting(), checkpointing=True)[2])


def test_fewer_steps_are_answered_from_what_is_there(monkeypatch):
    from likeness.core.host import fine_tuning

    monkeypatch.setattr(fine_tuning, "KEEP_EVERY", 2)
    setting = Setting()
    two, losses = fit_sine(setting, steps=2)
    five, _ = fit_sine(setting, steps=5)
    monkeypatch.setattr(fine_tuning, "optimise", None)
    again, shorter = fit_sine(setting, steps=2)
    assert same(two, again) and losses == shorter and again.header["settings"]["steps"] == 2
    reached, most = fit_sine(setting, steps=3)
    assert same(reached, five) and len(most) == 5 and reached.header["settings"]["steps"] == 5


def test_large_runs_lie_apart_and_are_resumed(tmp_path, monkeypatch):
    from likeness.core.host import fine_tuning

    setting = Setting()
    whole, losses = fit_sine(setting, steps=4, method="full weights", learning_rate=1e-3)
    for path in (tmp_path / "user").glob("likeness/*/*"):
        path.unlink()
    monkeypatch.setattr(fine_tuning, "LARGE_RUN", 1000)
    fit_sine(setting, steps=2, method="full weights", learning_rate=1e-3)
    resumed, again = fit_sine(setting, steps=4, method="full weights", learning_rate=1e-3)
    assert same(whole, resumed) and losses == again
    fit_sine(setting, steps=2, method="full weights", learning_rate=2e-3)
    assert len(list((tmp_path / "user" / "likeness" / "large_runs").iterdir())) == 1
    assert not list((tmp_path / "user" / "likeness" / "runs").iterdir())


# Text encoder
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return tiny_models.clip_l()


@pytest.mark.parametrize("layer", [None, -2])
def test_the_text_encoder_in_the_session_says_what_text_encode_says(clip, layer):
    from likeness.core.host.differentiable import TextEncoder, text_encoding

    clip = clip.clone()
    if layer is not None:
        clip.clip_layer(layer)
    text = "photo of a (sks:1.3) dog, " + "very " * 90
    ((rows, options),) = encode(clip, text)
    encoder = TextEncoder(clip)
    with text_encoding(clip):
        prompt = encoder.encode(encoder.tokens(text))
    assert rows.shape[1] == 154 and torch.equal(prompt.context.detach(), rows)
    assert torch.equal(prompt.pooled.detach(), options["pooled_output"])


def test_the_text_encoder_trains_too_and_comes_back_as_it_was(clip):
    setting = Setting()
    before, weights = encode(clip, "a dog")[0][0], dict(clip.cond_stage_model.named_parameters())
    model, tuned, lora, _ = train(setting, clip=clip)
    assert any(name.startswith("text_encoders.clip_l.") for name in lora)
    assert torch.equal(before, encode(clip, "a dog")[0][0])
    assert all(value is weights[name] for name, value in clip.cond_stage_model.named_parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in clip.cond_stage_model.modules())
    after = encode(tuned, "a dog")[0][0]
    assert float((after - before).abs().mean()) > 1e-4
    frozen = train(setting, positive=encode(clip, "photo of a sks dog"))
    assert not any(name.startswith("text_encoders") for name in frozen[2])
    assert frozen[3]["loss"][0] == pytest.approx(train(setting, clip=clip)[3]["loss"][0], abs=1e-6)


def test_all_weights_of_the_text_encoder_train_too_and_come_back_as_they_were(clip):
    setting = Setting()
    before, weights = encode(clip, "a dog")[0][0], dict(clip.cond_stage_model.named_parameters())
    _, tuned, lora, _ = train(setting, clip=clip, method="full weights", learning_rate=1e-3)
    assert "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.diff" in lora
    assert all(value is weights[name] for name, value in clip.cond_stage_model.named_parameters())
    assert torch.equal(before, encode(clip, "a dog")[0][0])
    assert float((encode(tuned, "a dog")[0][0] - before).abs().mean()) > 1e-4


def test_asking_for_more_steps_goes_on_exactly(clip, tmp_path):
    whole = train(Setting(), clip=clip)
    for path in (tmp_path / "user").glob("likeness/*/*"):
        path.unlink()
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = sine_inputs(Setting(), clip=clip)
    del inputs["positive"]
    run_node(LikenessFineTune, **{**inputs, "steps": 1})
    assert same(train(Setting(), clip=clip)[2], whole[2])


def test_sdxl_trains_both_text_encoders_and_the_pooled_vector():
    setting, clip = Setting("sdxl"), tiny_models.clip_xl()
    text = "photo of a sks dog"
    _, _, lora, loss = train(setting, clip=clip)
    for part in ("clip_l", "clip_g"):
        ups = [value for name, value in lora.items() if f".{part}." in name and name.endswith("lora_up.weight")]
        assert ups and any(bool(value.any()) for value in ups)
    frozen = train(setting, positive=encode(clip, text))
    assert frozen[3]["loss"][0] == pytest.approx(loss["loss"][0], abs=1e-5)


def test_prior_pictures_use_the_text_encoder_too(clip):
    setting = Setting()
    image = 1 - setting.image
    plain = train(setting, clip=clip)
    prior = {"clip": clip, "prior_weight": 1.0, "prior_image": image}
    one, two = (train(setting, **prior, prior_prompt=words) for words in ("photo of a dog", "photo of a cat"))
    assert one[3]["loss"][0] > plain[3]["loss"][0] and not same(one[2], two[2])


# Beside stock nodes
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoRA", "full weights"])
def test_stock_loaders_take_all_of_it(clip, tmp_path, caplog, method):
    from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA

    from nodes import LoraLoader

    setting = Setting()
    model, tuned_clip, lora, _ = train(setting, clip=clip, patches=False, method=method, learning_rate=0.003)
    expected = picture(setting, model)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_node(SaveLoRA, lora=lora, prefix="kept")
        (tmp_path / "loras").mkdir()
        (saved,) = (tmp_path / "output").iterdir()
        saved.rename(tmp_path / "loras" / "kept.safetensors")
        inputs = {"lora_name": "kept.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
        by_file, its_clip = run_node(LoraLoader, model=setting.model, clip=clip, **inputs)
    assert not [record for record in caplog.records if "not loaded" in record.message.lower()]
    assert torch.equal(expected, picture(setting, by_file))
    assert torch.equal(encode(tuned_clip, "a dog")[0][0], encode(its_clip, "a dog")[0][0])
    direct = run_node(LoraModelLoader, model=setting.model, lora=lora, strength_model=1.0, **_bypass(LoraModelLoader))[
        0
    ]
    assert torch.equal(expected, picture(setting, direct))


def _bypass(node) -> dict:
    """Newer ComfyUI's loader has one more required input."""
    names = [widget.id for widget in node.define_schema().inputs]
    return {"bypass": False} if "bypass" in names else {}


def test_stock_loaders_name_the_map_that_they_leave_out(caplog):
    from comfy_extras.nodes_train import LoraModelLoader

    setting = Setting()
    lora = train(setting)[2]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run_node(LoraModelLoader, model=setting.model, lora=lora, strength_model=1.0, **_bypass(LoraModelLoader))
    missing = [record.message for record in caplog.records if "not loaded" in record.message.lower()]
    assert missing == ["lora key not loaded: likeness.needs_position_map"]


# Files
# ------------------------------------------------------------------------------------------


def test_save_and_load_give_model_clip_map_prompt_and_positive(clip):
    from likeness.nodes.tuned_files import LikenessLoadTuned, LikenessSaveTuned

    setting = Setting()
    model, tuned_clip, lora, _ = train(setting, clip=clip)
    passed, name = run_node(LikenessSaveTuned, lora=lora, filename_prefix="likeness/tuned")
    assert passed is lora and name == "likeness/tuned_00001_.safetensors"
    inputs = {"name": name, "model": setting.model, "strength": 1.0}
    found, its_clip, prompt, positive, info = run_node(LikenessLoadTuned, **inputs, clip=clip)
    assert prompt == "photo of a sks dog" and prompt in info
    assert torch.equal(picture(setting, model), picture(setting, found))
    assert torch.equal(positive[0][0], encode(tuned_clip, prompt)[0][0])
    assert torch.equal(encode(its_clip, prompt)[0][0], positive[0][0])
    same_model, _, _, _, _ = run_node(LikenessLoadTuned, **{**inputs, "strength": 0.0}, clip=clip)
    assert same_model is setting.model
    _, no_clip, _, no_positive, _ = run_node(LikenessLoadTuned, **inputs)
    assert {type(no_clip).__name__, type(no_positive).__name__} == {"ExecutionBlocker"}
    assert len({LikenessLoadTuned.fingerprint_inputs(**inputs) for _ in range(2)}) == 1


def test_a_file_of_the_stock_save_node_gets_its_map_back(tmp_path):
    from safetensors.torch import save_file

    from likeness.core.host.position_map import position_map_of
    from likeness.nodes.tuned_files import LikenessLoadTuned

    setting = Setting()
    model, _, lora, _ = train(setting)
    (tmp_path / "loras").mkdir()
    save_file(dict(lora), tmp_path / "loras" / "bare.safetensors")
    found, _, prompt, positive, info = run_node(
        LikenessLoadTuned, name="bare.safetensors", model=setting.model, strength=1.0, clip=tiny_models.clip_l(layers=1)
    )
    assert position_map_of(found) == position_map_of(model) and prompt == "" and "not recorded" in info
    assert type(positive).__name__ == "ExecutionBlocker"
    assert torch.equal(picture(setting, model), picture(setting, found))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\0b", "C:\\x.safetensors", ""])
def test_names_that_leave_the_folder_are_refused(name):
    from likeness.nodes.tuned_files import LikenessLoadTuned, LikenessSaveTuned

    setting = Setting()
    with pytest.raises(ValueError, match="not a plain name"):
        run_node(LikenessLoadTuned, name=name, model=setting.model, strength=1.0)
    with pytest.raises(ValueError, match="not a plain name"):
        run_node(LikenessSaveTuned, lora=train(setting)[2], filename_prefix=name)


def test_another_lora_is_not_saved_as_ours():
    from likeness.nodes.tuned_files import LikenessSaveTuned

    with pytest.raises(ValueError, match="was not made by Fine-Tune On Picture"):
        run_node(LikenessSaveTuned, lora={"x": torch.zeros(1)}, filename_prefix="a")


def test_another_family_is_refused_by_the_loader():
    from likeness.nodes.tuned_files import LikenessLoadTuned, LikenessSaveTuned

    name = run_node(LikenessSaveTuned, lora=train(Setting())[2], filename_prefix="a")[1]
    with pytest.raises(ValueError, match="connect the model"):
        run_node(LikenessLoadTuned, name=name, model=Setting("sdxl").model, strength=1.0)


# Bad input
# ------------------------------------------------------------------------------------------


def quantised() -> Setting:
    setting = Setting()
    with torch.inference_mode():
        setting.model.model.diffusion_model.to(torch.float8_e4m3fn)
    return setting


BAD = {
    "no prompt at all": ({"positive": None}, "either a CLIP.*neither came in"),
    "two prompts": ({"positive": [[torch.zeros(1, 77, 768), {}]] * 2}, "2 prompts"),
    "smaller than the grid": ({"image": torch.zeros(1, 12, 80, 3)}, "80 x 12 pixels.*16 x 16 cells"),
    "not a picture": ({"image": torch.zeros(64, 64, 3)}, "expected finite numbers"),
    "nan": ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "expected finite numbers"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
    "mask of another picture": ({"mask": torch.ones(1, 32, 64)}, "64 x 32 pixels.*very picture"),
    "three masks": ({"mask": torch.ones(3, 64, 64)}, "3 masks came with 1 pictures"),
    "prior without pictures": ({"prior_weight": 1.0}, "no pictures are connected to 'prior_image'"),
    "prior without prompt": (
        {"prior_weight": 1.0, "prior_image": torch.zeros(1, 64, 64, 3)},
        "nothing is connected to 'prior_positive'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence_before_work_starts(name, tmp_path, monkeypatch):
    from likeness.core.host import fine_tuning

    monkeypatch.setattr(fine_tuning, "optimise", None)
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        train(Setting(), **change)
    assert not list((tmp_path / "user").glob("likeness/*/*"))


def test_clip_and_positive_together_are_refused(clip):
    from likeness.nodes.fine_tune import LikenessFineTune

    with pytest.raises(ValueError, match="both came in"):
        run_node(LikenessFineTune, **sine_inputs(Setting(), clip=clip))
    with pytest.raises(ValueError, match="'prior_prompt' is empty"):
        train(Setting(), clip=clip, prior_weight=1.0, prior_image=torch.zeros(1, 64, 64, 3))


def test_all_weights_of_a_quantised_model_are_refused():
    with pytest.raises(ValueError, match="float8_e4m3fn.*train a LoRA"):
        train(quantised(), method="full weights")


def test_a_vae_of_other_latents_is_refused():
    vae = autoencoder()

    class Other:
        def __getattr__(self, name):
            return getattr(vae, name)

        def encode(self, pixels):
            return torch.zeros(pixels.shape[0], 16, 8, 8)

    with pytest.raises(ValueError, match=r"\(1, 16, 8, 8\).*expects \[batch, 4.*own VAE"):
        train(Setting(), vae=Other())
