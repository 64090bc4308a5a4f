"""Files of fine-tunes: our own save and load nodes, and the stock loaders."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from .. import tiny_models
from .fine_tunes import encode, picture, train
from .methods import run_node
from .setting import SharedSetting as Setting

pytestmark = pytest.mark.usefixtures("own_folders")


@functools.cache
def tuned_once() -> tuple:
    """What the node gives after one update."""
    return train(Setting(), steps=1)


# Beside stock nodes
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoRA", "full weights"])
def test_stock_loaders_take_all_of_it(clip, tmp_path, caplog, method):
    from comfy_extras.nodes_train import LoraModelLoader, SaveLoRA

    from nodes import LoraLoader

    setting = Setting()
    model, tuned_clip, lora, _ = train(setting, clip=clip, patches=False, method=method, learning_rate=0.003, steps=1)
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
    lora = tuned_once()[2]
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
    model, tuned_clip, lora, _ = train(setting, clip=clip, steps=1)
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

    from likeness.core.sine.host.position_map import position_map_of
    from likeness.nodes.tuned_files import LikenessLoadTuned

    setting = Setting()
    model, _, lora, _ = tuned_once()
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
        run_node(LikenessSaveTuned, lora=tuned_once()[2], filename_prefix=name)


def test_another_lora_is_not_saved_as_ours():
    from likeness.nodes.tuned_files import LikenessSaveTuned

    with pytest.raises(ValueError, match="was not made by Fine-Tune On Image"):
        run_node(LikenessSaveTuned, lora={"x": torch.zeros(1)}, filename_prefix="a")


def test_another_family_is_refused_by_the_loader():
    from likeness.nodes.tuned_files import LikenessLoadTuned, LikenessSaveTuned

    name = run_node(LikenessSaveTuned, lora=tuned_once()[2], filename_prefix="a")[1]
    with pytest.raises(ValueError, match="connect the model"):
        run_node(LikenessLoadTuned, name=name, model=Setting("sdxl").model, strength=1.0)


LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q"
OTHERS = {
    "another width": (
        {"lora_up.weight": (128, 2), "lora_down.weight": (2, 128)},
        "has 16384 numbers for .*, this model",
    ),
    "another input": (
        {"lora_up.weight": (64, 2), "lora_down.weight": (2, 65)},
        "has 4160 numbers for .*, this model 4096",
    ),
    "another difference": ({"diff": (3, 3)}, "has 9 numbers for .*, this model 4096"),
    "one number": ({"diff": ()}, "has 1 numbers for .*, this model 4096"),
    "no rank": ({"lora_up.weight": (64, 0), "lora_down.weight": (0, 64)}, "holds no matching pair"),
    "half of a LoKr": ({"lokr_w2": (16, 16)}, "holds no matching pair"),
    "no such bias": ({"diff_b": (3,)}, "has 3 numbers for .*, this model 0"),
    "a strength alone": ({"alpha": ()}, "for layers that this model does not have"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_fit_no_layer_are_refused(tmp_path, name):
    """ComfyUI leaves them out with a line in the log, and the picture shows no subject."""
    from safetensors.torch import save_file

    from likeness.nodes.tuned_files import LikenessLoadTuned

    shapes, said = OTHERS[name]
    (tmp_path / "loras").mkdir()
    save_file(
        {f"{LAYER}.{part}": torch.ones(shape) for part, shape in shapes.items()}, tmp_path / "loras" / "a.safetensors"
    )
    with pytest.raises(ValueError, match=said):
        run_node(LikenessLoadTuned, name="a.safetensors", model=Setting().model, strength=1.0)


@pytest.mark.parametrize(
    "shapes",
    [
        {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)},
        {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2": (8, 8)},
    ],
    ids=["LoHa", "LoKr of low-rank factors"],
)
def test_forms_of_other_trainers_in_memory_do_what_comfyui_does_with_them(shapes):
    import comfy.lora
    import comfy.sd

    from likeness.core.lora.artifact import FineTunedWeights
    from likeness.core.lora.host.apply import apply_lora

    setting, generator = Setting(), torch.Generator().manual_seed(2)
    weights = {f"{LAYER}.{part}": torch.rand(shape, generator=generator) for part, shape in shapes.items()}
    applied, _ = apply_lora(FineTunedWeights(weights), setting.model, None, 1.0)
    stock, _ = comfy.sd.load_lora_for_models(setting.model, None, weights, 1.0, 0.0)
    assert f"{LAYER}.weight" in applied.patches
    assert torch.equal(picture(setting, applied), picture(setting, stock))
    assert not torch.equal(picture(setting, applied), picture(setting, setting.model))


def test_weights_of_another_family_without_a_header_are_refused(tmp_path):
    from safetensors.torch import save_file

    from likeness.nodes.tuned_files import LikenessLoadTuned

    (tmp_path / "loras").mkdir()
    save_file(
        {"diffusion_model.double_blocks.0.img_attn.qkv.diff": torch.ones(4, 4)}, tmp_path / "loras" / "a.safetensors"
    )
    with pytest.raises(ValueError, match="for layers that this model does not have, such as 'diffusion_model.double"):
        run_node(LikenessLoadTuned, name="a.safetensors", model=Setting().model, strength=1.0)
