"""Patches on transformers: which models can be told where a crop lies, what they are told, and what the others get."""

from __future__ import annotations

import logging

import pytest
import torch

from likeness.core.session.session import BOXES
from likeness.core.sine.host.position_map import RotaryMap, position_map_of, takes_map, with_position_map
from likeness.core.sine.position_map import needed_map, rotary_positions

from .methods import run_node
from .test_families import FAMILIES, each_family, image_of, predicted
from .test_lora_types import lora_of

CELLS = 16


def level(model) -> torch.Tensor:
    sigmas = model.get_model_object("model_sampling").sigmas
    return sigmas[len(sigmas) // 2].float().view(1)


def with_options(model, rope: dict):
    clone = model.clone()
    clone.model_options["transformer_options"]["rope_options"] = rope
    return clone


def seen_by(model, prompt, x: torch.Tensor) -> dict:
    """The rope options that reach the network."""
    from comfy.patcher_extension import WrappersMP

    found, clone = [], model.clone()

    def spy(executor, *args, **more):
        found.append(args[-1].get("rope_options"))
        return executor(*args, **more)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", spy)
    predicted(clone, prompt, x, level(model))
    return found[0]


@each_family
def test_a_model_is_told_where_it_is_if_its_positions_move(name):
    family = FAMILIES[name]
    model, x = family.model(), family.latents(2)
    with torch.inference_mode():
        follows = takes_map(model, family.prompt(1))
    plain = predicted(model, family.prompt(1), x, level(model))
    shifted = predicted(with_options(model, {"shift_y": 3.0}), family.prompt(1), x, level(model))
    assert follows == (not torch.equal(plain, shifted))


def test_the_tokens_of_a_crop_stand_where_the_whole_image_has_them():
    """A crop of rows 4 to 12 of 16 cells, columns 0 to 16, in a latent of 8 x 8 with tokens of 2 x 2."""
    rope = rotary_positions((4, 0, 12, 16), (8, 8), 2, {})
    rows, columns = (rope[f"shift_{axis}"] + rope[f"scale_{axis}"] * torch.arange(4) for axis in "yx")
    torch.testing.assert_close(rows, torch.tensor([2.0, 3.0, 4.0, 5.0]))  # as large as in the whole image
    torch.testing.assert_close(columns, torch.tensor([0.5, 2.5, 4.5, 6.5]))  # each as wide as two
    moved = rotary_positions((4, 0, 12, 16), (8, 8), 2, {"shift_y": 10.0, "scale_y": 0.5, "shift_t": 1.0})
    assert moved["shift_t"] == 1.0 and moved["shift_x"] == 0.5
    torch.testing.assert_close(moved["shift_y"] + moved["scale_y"] * torch.arange(4), 10 + 0.5 * rows)


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "Z-Image", "Wan"])
def test_the_whole_image_keeps_its_positions_and_a_tile_gets_its_own(name):
    family = FAMILIES[name]
    model, prompt = family.model(), family.prompt(1)
    x, patch = family.latents(2), getattr(model.model.diffusion_model, "patch_size", 1)
    side = x.shape[-1]
    whole = with_position_map(model, side, "bilinear")
    plain = predicted(model, prompt, x, level(model))
    torch.testing.assert_close(predicted(whole, prompt, x, level(model)), plain, atol=1e-5, rtol=0)
    wide = with_position_map(model, 2 * side, "bilinear")
    assert not torch.allclose(predicted(wide, prompt, x, level(model)), plain, atol=1e-4)
    tile = with_position_map(model, 2 * side, "bilinear", (0.5, 0.25, 0.5, 0.5))
    size = patch if isinstance(patch, int) else patch[-1]
    expected = {"scale_y": 1.0, "scale_x": 1.0, "shift_y": side / size, "shift_x": side / 2 / size}
    assert seen_by(tile, prompt, x) == expected


def test_a_box_of_a_training_and_areas():
    family = FAMILIES["FLUX.1"]
    wrapper = RotaryMap(position_map_of(with_position_map(family.model(), CELLS, "bilinear")))
    found = []

    class Executor:
        class_obj = family.model().model

        def __call__(self, *args, **_more):
            found.append(args[-1]["rope_options"])

    x = torch.zeros(1, 16, 8, 8)
    wrapper(Executor(), x, None, None, None, None, {BOXES: torch.tensor([[2, 4, 10, 12]])})
    assert found == [{"scale_y": 1.0, "scale_x": 1.0, "shift_y": 1.0, "shift_x": 2.0}]
    places = {"likeness.areas": {1: (0.0, 0.0, 1.0, 0.5), 2: (0.0, 0.5, 1.0, 0.5)}}
    with pytest.raises(ValueError, match="different areas.*expected are areas of different sizes"):
        wrapper(Executor(), x, None, None, None, None, {**places, "uuids": [1, 2]})


def test_a_map_is_refused_by_a_model_that_cannot_follow():
    from likeness.nodes.position_map import LikenessPositionMap

    with pytest.raises(ValueError, match="A SD3 cannot be told where.*use this model without"):
        run_node(LikenessPositionMap, model=FAMILIES["SD3.5"].model(), cells=16, interpolation="bilinear")


@pytest.mark.usefixtures("own_folders")
def test_crops_are_trained_at_their_place(monkeypatch, tmp_path):
    family, losses = FAMILIES["FLUX.1"], []
    for call in (RotaryMap.__call__, lambda _self, executor, *args, **more: executor(*args, **more)):
        monkeypatch.setattr(RotaryMap, "__call__", call)
        tuned, _, lora, loss = lora_of(family, "LoRA", patches=True)
        assert needed_map(lora) == (16, "bilinear") and position_map_of(tuned).cells == 16
        losses.append(loss["loss"])
        for path in (tmp_path / "user").glob("likeness/runs/*"):
            path.unlink()
    placed, unplaced = losses
    assert all(abs(one - other) > 1e-6 for one, other in zip(placed, unplaced, strict=True)), losses


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["SD3.5", "Qwen-Image"])
def test_others_are_trained_on_the_whole_image_and_it_is_said(name, caplog, tmp_path):
    caplog.set_level(logging.INFO, "likeness")
    family = FAMILIES[name]
    off = lora_of(family, "LoRA", patches=False)
    assert "Patches are off" not in caplog.text and "patches" not in off[2].header["settings"]
    small = image_of(family.image, family.image)[:, :12, :12]  # less than the 16 cells that patches would need
    _, _, lora, loss = lora_of(family, "LoRA", patches=True)
    assert "Patches are off: this model, a" in caplog.text and "400 to 800 steps" in caplog.text
    assert loss == off[3] and needed_map(lora) is None and lora.header["settings"]["patches"] == "not on this model"
    assert len(list((tmp_path / "user" / "likeness" / "runs").iterdir())) == 1
    lora_of(family, "LoRA", patches=True, image=small)


@pytest.mark.usefixtures("own_folders")
def test_a_model_that_reads_positions_and_does_not_follow_them_is_trained_on_the_whole_image(monkeypatch):
    from likeness.core.sine.host import position_map

    family = FAMILIES["FLUX.1"]
    monkeypatch.setattr(position_map, "_follows", {})
    network = type(family.model().model.diffusion_model)
    process = network.process_img
    monkeypatch.setattr(
        network, "process_img", lambda self, x, *args, transformer_options=None: process(self, x, *args)
    )
    assert needed_map(lora_of(family, "LoRA", patches=True)[2]) is None
