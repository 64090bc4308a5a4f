"""The fine-tune node: what comes out, resuming, and what bad input gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from likeness.core.session import stores
from likeness.core.session.session import Session
from likeness.core.sine.position_map import needed_map

from .. import tiny_models
from .fine_tunes import distance, picture, same, train
from .methods import autoencoder, fit_sine, run_node, sine_inputs
from .setting import Setting as NewSetting
from .setting import SharedSetting as Setting

pytestmark = pytest.mark.usefixtures("own_folders")

# What comes out
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoRA", "full weights"])
def test_the_model_output_is_what_the_artifact_gives(method):
    from likeness.core.sine.host.position_map import apply_fine_tune, position_map_of

    setting = Setting()
    model, clip, lora, loss = train(setting, method=method, learning_rate=0.003)
    assert len(loss["loss"]) == 2 and type(clip).__name__ == "ExecutionBlocker"
    found = position_map_of(model)
    assert (found.cells, found.interpolation) == (16, "bilinear") and position_map_of(setting.model) is None
    with torch.inference_mode():
        again, _ = apply_fine_tune(lora, setting.model, None, 1.0)
    assert torch.equal(picture(setting, model), picture(setting, again))


def test_the_artifact_says_what_it_is():
    lora = train(Setting(), interpolation="nearest", cells=20, whole_image=0.5, mask=torch.ones(1, 64, 64))[2]
    assert needed_map(lora) == (20, "nearest") and lora.prompt == "photo of a sks dog"
    header = lora.header
    assert header["method"] == "sine" and header["base"]["family"] == "SD15" and len(header["losses"]) == 2
    expected = {"steps": 2, "rank": 4, "resolution": 64, "whole_image": 0.5, "masked": True, "pictures": 1}
    assert expected.items() <= header["settings"].items()
    plain = train(Setting(), patches=False)[2]
    assert needed_map(plain) is None and plain.header["settings"]["recon_weight"] == 0.0


def test_without_patches_every_picture_is_seen_whole():
    setting = Setting(images=3)
    _, _, lora, loss = train(setting, patches=False)
    assert len(loss["loss"]) == 2
    first = Setting()
    first.image = setting.image[:1]
    assert not same(lora, train(first, patches=False)[2])


def test_a_map_that_already_lies_on_the_model_is_kept_by_training_without_patches():
    from likeness.core.sine.host.position_map import with_position_map

    setting = Setting()
    with torch.inference_mode():
        setting.model = with_position_map(setting.model, 24, "nearest")
    assert needed_map(train(setting, patches=False)[2]) == (24, "nearest")


@pytest.mark.parametrize("place", ["trained", "applied"])
def test_a_map_of_another_grid_is_refused(place):
    from likeness.core.sine.host.position_map import apply_fine_tune, with_position_map

    setting = Setting()
    lora = train(setting)[2]
    with torch.inference_mode():
        setting.model = with_position_map(setting.model, 24, "bilinear")
    with pytest.raises(ValueError, match="map of 24 cells, bilinear; 16 cells, bilinear were asked for"):
        train(setting) if place == "trained" else apply_fine_tune(lora, setting.model, None, 1.0)


def test_the_window_of_a_map_stays():
    from likeness.core.sine.host.position_map import apply_fine_tune, position_map_of, with_position_map

    setting, window = Setting(), (0.0, 0.5, 1.0, 0.5)
    with torch.inference_mode():
        setting.model = with_position_map(setting.model, 16, "bilinear", window)
        model, _, lora, _ = train(setting)
        again, _ = apply_fine_tune(lora, setting.model, None, 1.0)
    assert position_map_of(model).window == position_map_of(again).window == window


def test_inputs_decide_the_result_and_checkpointing_does_not(tmp_path):
    setting, short = Setting(), {"steps": 1}
    plain, count = train(setting, **short), 1
    files = lambda: len(list((tmp_path / "user" / "likeness" / "runs").iterdir()))  # noqa: E731
    assert files() == count
    checkpointed = train(setting, checkpointing=True, **short)
    assert files() == count and same(plain[2], checkpointed[2])
    other_picture = 1 - setting.image
    changes = [
        {"patches": False},
        {"rank": 2},
        {"resolution": 72},
        {"seed": 1},
        {"whole_image": 1.0},
        {"recon_weight": 0.0},
        {"cells": 20},
        {"interpolation": "nearest"},
        {"learning_rate": 0.01},
        {"positive": setting.target},
        {"image": other_picture},
        {"prior_weight": 0.5, "prior_image": other_picture, "prior_positive": setting.empty},
        {"vae": tiny_models.taesd(seed=3)},
    ]
    for change in changes:
        _, _, lora, loss = train(setting, **short, **change)
        count += 1
        assert files() == count and (not same(lora, plain[2]) or loss != plain[3]), change
    crops = [train(setting, steps=2, crops=number)[2] for number in (5, 1)]  # the first crop is the same
    assert files() == count + 1 and not same(*crops)


def test_checkpointing_gives_the_same_weights():
    """But for rounding: what a block adds to the gradient of a tensor that others use too is summed up first."""
    first = train(Setting(), patches=True, steps=2)[2]
    import folder_paths

    for path in Path(folder_paths.get_user_directory()).glob("likeness/*/*"):
        path.unlink()
    assert distance(first, train(Setting(), checkpointing=True, steps=2)[2]) < 1e-4


def test_fewer_steps_are_answered_from_what_is_there(monkeypatch, caplog):
    from likeness.core.sine.host import fine_tune as fine_tuning

    monkeypatch.setattr(fine_tuning, "KEEP_EVERY", 2)
    setting = Setting()
    two, losses = fit_sine(setting, steps=2)
    five, _ = fit_sine(setting, steps=5)
    monkeypatch.setattr(Session, "run", None)
    again, shorter = fit_sine(setting, steps=2)
    assert same(two, again) and losses == shorter and again.header["settings"]["steps"] == 2
    assert "steps were asked for" not in caplog.text
    reached, most = fit_sine(setting, steps=3)
    assert same(reached, five) and len(most) == 5 and reached.header["settings"]["steps"] == 5
    (said,) = [record for record in caplog.records if "steps were asked for" in record.message]
    assert said.levelname == "WARNING" and "you get step 5. Ask for a step that was kept (2, 4)" in said.message


def full(steps: int) -> tuple:
    return fit_sine(Setting(), steps=steps, method="full weights", learning_rate=1e-3)


def test_fewer_steps_of_all_weights_are_trained_anew_and_nothing_is_lost(tmp_path, monkeypatch):

    one, losses = full(1)
    for path in (tmp_path / "user").glob("likeness/*/*"):
        path.unlink()
    three, _ = full(3)
    shorter, again = full(1)
    assert same(one, shorter) and losses == again and not same(one, three)
    monkeypatch.setattr(Session, "run", None)
    assert same(full(3)[0], three) and same(full(1)[0], one)


def test_a_shorter_run_of_all_weights_is_served_after_the_longer_one_is_gone(monkeypatch):

    monkeypatch.setattr(stores, "LARGE_RUN", 1000)  # the newest alone is kept
    full(2)
    shorter, _ = full(1)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", None)
        assert same(full(1)[0], shorter)


def test_a_high_learning_rate_of_all_weights_is_told(caplog):
    setting = Setting()
    train(setting, method="full weights", learning_rate=1e-5, steps=1)
    train(setting, learning_rate=1e-3, steps=1)
    assert "the paper uses" not in caplog.text
    train(setting, method="full weights", learning_rate=1e-4, steps=1)
    assert "learning rate 0.0001; the paper uses 1e-06" in caplog.text


def test_the_default_prompt_beside_an_encoded_one_is_told(caplog, clip):
    caplog.set_level("INFO", logger="likeness")
    setting = Setting()
    train(setting, prompt="a painting of xyz", steps=1)
    train(setting, clip=clip, steps=1)
    assert "'positive' is connected" not in caplog.text
    train(setting, steps=1)
    assert "'positive' is connected and 'prompt' is the default, 'photo of a sks dog'" in caplog.text


def test_an_empty_training_prompt_is_said(caplog, clip):
    setting = Setting()
    train(setting, positive=None, clip=clip, prompt="", steps=1)
    assert "The training prompt is empty: name the subject in it" in caplog.text
    caplog.clear()
    train(setting, positive=None, clip=clip, prompt="a dog", steps=1)
    assert "prompt is empty" not in caplog.text


def test_large_runs_lie_apart_and_are_resumed(tmp_path, monkeypatch):

    setting = Setting()
    whole, losses = fit_sine(setting, steps=3, method="full weights", learning_rate=1e-3)
    for path in (tmp_path / "user").glob("likeness/*/*"):
        path.unlink()
    monkeypatch.setattr(stores, "LARGE_RUN", 1000)
    fit_sine(setting, steps=2, method="full weights", learning_rate=1e-3)
    resumed, again = fit_sine(setting, steps=3, method="full weights", learning_rate=1e-3)
    assert same(whole, resumed) and losses == again
    fit_sine(setting, steps=1, method="full weights", learning_rate=2e-3)
    assert len(list((tmp_path / "user" / "likeness" / "large_runs").iterdir())) == 1
    assert not list((tmp_path / "user" / "likeness" / "runs").iterdir())


# Bad input
# ------------------------------------------------------------------------------------------


def quantised() -> NewSetting:
    setting = NewSetting()
    with torch.inference_mode():
        setting.model.model.diffusion_model.to(torch.float8_e4m3fn)
    return setting


BAD = {
    "no prompt at all": ({"positive": None}, "either a CLIP.*neither came in"),
    "two prompts": ({"positive": [[torch.zeros(1, 77, 768), {}]] * 2}, "2 prompts"),
    "smaller than the grid": ({"image": torch.zeros(1, 12, 80, 3)}, "80 x 12 pixels.*16 x 16 cells"),
    "not an image": ({"image": torch.zeros(64, 64, 3)}, "expected .batch"),
    "nan": ({"image": torch.full((1, 64, 64, 3), float("nan"))}, "NaN or infinite"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
    "mask of another image": ({"mask": torch.ones(1, 32, 64)}, "64 x 32 pixels.*very image"),
    "three masks": ({"mask": torch.ones(3, 64, 64)}, "3 masks came with 1 images"),
    "prior without images": ({"prior_weight": 1.0}, "no images are connected to 'prior_image'"),
    "prior without prompt": (
        {"prior_weight": 1.0, "prior_image": torch.zeros(1, 64, 64, 3)},
        "nothing is connected to 'prior_positive'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence_before_work_starts(name, tmp_path, monkeypatch):

    monkeypatch.setattr(Session, "run", None)
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


def test_quantised_weights_that_say_that_they_are_floats_are_refused():
    """As those of the newest core do."""

    class Quantised(torch.Tensor):
        pass

    setting = NewSetting()
    layer = next(each for each in setting.model.model.modules() if isinstance(each, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)
    with pytest.raises(ValueError, match="from Quantised: .*train a LoRA"):
        train(setting, method="full weights")


def test_a_vae_of_other_latents_is_refused():
    vae = autoencoder()

    class Other:
        def __getattr__(self, name):
            return getattr(vae, name)

        def encode(self, pixels):
            return torch.zeros(pixels.shape[0], 16, 8, 8)

    with pytest.raises(ValueError, match=r"\(1, 16, 8, 8\).*expects \[batch, 4.*own VAE"):
        train(Setting(), vae=Other())
