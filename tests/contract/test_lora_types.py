"""The kinds of a LoRA: what they train, what the stock loader makes of their files, and the mask of a T-LoRA."""

from __future__ import annotations

import functools

import pytest
import torch

from likeness.core.lora.timestep_rank import MARKER

from .. import tiny_families
from .fine_tunes import train
from .methods import run_node, sample
from .setting import SharedSetting as Setting
from .test_families import image_of, predicted

FAMILIES = tiny_families.families()


def lora_of(family, kind: str, **changes) -> tuple:
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = {
        "model": family.model(),
        "vae": family.autoencoder(),
        "image": image_of(family.image, family.image),
        "patches": False,
    }
    inputs |= {"positive": family.prompt(1), "prompt": "photo of a sks dog", "steps": 2, "learning_rate": 0.05}
    inputs |= {"rank": 4, "resolution": family.image, "seed": 0, "whole_image": 0.0, "recon_weight": 0.0, "cells": 0}
    inputs |= {"interpolation": "bilinear", "crops": 5, "prior_weight": 0.0, "prior_prompt": "", "method": "LoRA"}
    return run_node(LikenessFineTune, checkpointing=False, lora_type=kind, **{**inputs, **changes})


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("kind", ["T-LoRA", "LoKr"])
@pytest.mark.parametrize("name", ["FLUX.2", "Z-Image", "Wan", "HiDream"])
def test_the_stock_loader_takes_every_key_and_makes_the_nodes_model(name, kind, tmp_path, caplog):
    import comfy.sd
    import comfy.utils

    from likeness.core.lora.artifact import save_fine_tune
    from likeness.core.sine.artifact import load_fine_tune, summary
    from likeness.core.sine.host.position_map import apply_fine_tune

    family = FAMILIES[name]
    tuned, _, lora, loss = lora_of(family, kind)
    save_fine_tune(tmp_path / "lora.safetensors", lora)
    model, source, x = family.model(), family.prompt(1), family.latents(2)
    loaded = load_fine_tune(tmp_path / "lora.safetensors")
    assert ("T-LoRA" if kind == "T-LoRA" else "LoKr of the UNet") in summary(loaded) and len(loss["loss"]) == 2
    assert lora.header["settings"]["form"] == kind
    with torch.inference_mode():
        read = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
        stock, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 0.0)
        again, _ = apply_fine_tune(loaded, model, None, 1.0)
    missing = [record.args or record.message for record in caplog.records if "not loaded" in record.message]
    assert len(missing) == (1 if kind == "T-LoRA" else 0) and (not missing or MARKER in str(missing))
    sigmas = model.get_model_object("model_sampling").sigmas.float()
    low, high = sigmas[0].view(1), sigmas[-1].view(1)
    for sigma, same in ((low, True), (high, kind == "LoKr")):
        plain, wanted, ours = (predicted(each, source, x, sigma) for each in (model, stock, tuned))
        error, effect = float((ours - wanted).abs().mean()), float((wanted - plain).abs().mean())
        assert effect > 0 and (error < 0.01 * effect) is same, (sigma, error, effect)
        assert torch.equal(ours, predicted(again, source, x, sigma))


def test_a_lokr_has_the_sizes_and_the_start_of_comfys_own():
    from comfy.weight_adapter.lokr import LoKrAdapter

    from likeness.core.lora.kronecker import Kronecker

    for rows, columns, rank in ((320, 768, 16), (96, 96, 4), (127, 360, 8)):
        layer = torch.nn.Linear(columns, rows)
        ours = Kronecker(layer, rank, torch.Generator().manual_seed(0))
        stock = LoKrAdapter.create_train(layer.weight, rank)
        for one, other in ((ours.small, stock.lokr_w1), (ours.large, stock.lokr_w2)):
            assert one.shape == other.shape
            assert abs(float(one.detach().std() - other.detach().std())) <= 0.15 * float(other.detach().std())


@pytest.mark.usefixtures("own_folders")
def test_the_type_is_a_part_of_the_run_and_the_old_one_is_not(tmp_path):
    setting, files = Setting(), tmp_path / "user" / "likeness" / "runs"
    plain = train(setting, steps=2)
    assert "form" not in plain[2].header["settings"]
    again = train(setting, steps=2, lora_type="LoRA")
    assert len(list(files.iterdir())) == 1 and all(torch.equal(plain[2][name], again[2][name]) for name in plain[2])
    losses = {tuple(train(setting, steps=2, lora_type=kind)[3]["loss"]) for kind in ("LoRA", "T-LoRA", "LoKr")}
    assert len(losses) == 3 and len(list(files.iterdir())) == 3


@functools.cache
def masked() -> tuple:
    """A setting, its model with a T-LoRA, and the T-LoRA."""
    setting = Setting()
    tuned, _, lora, _ = train(setting, lora_type="T-LoRA", learning_rate=0.05, patches=False)
    return setting, tuned, lora


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("omega", [0.0, 0.5, 1.0])
def test_guidance_and_a_weak_model_keep_the_mask(omega):
    from likeness.core.lora.artifact import FineTunedWeights
    from likeness.core.sine.host.guidance import subject_model, with_guidance
    from likeness.core.sine.host.personalization import with_personalization
    from likeness.core.sine.host.position_map import apply_fine_tune

    (setting, tuned, lora), cfg = masked(), 3.0
    plain = FineTunedWeights({name: value for name, value in lora.items() if name != MARKER}, lora.header)

    def first_step(model, positive, cfg: float = 1.0) -> torch.Tensor:  # at the highest noise: half of the ranks
        return sample(model, positive, setting.empty, setting.latent, cfg=cfg, steps=1)

    with torch.inference_mode():
        unmasked, _ = apply_fine_tune(plain, setting.model, None, 1.0)
        weak, _ = apply_fine_tune(lora, setting.model, None, omega)
        guided = with_guidance(setting.model, [subject_model(tuned, setting.target, 1.0, 1.0)])
        personal = with_personalization(setting.model, tuned, omega)
    ours, negative = first_step(tuned, setting.target), first_step(weak, setting.empty)
    effect = float((ours - first_step(unmasked, setting.target)).abs().mean())  # of the mask
    wanted = {guided: (1.0, ours), personal: (cfg, negative + cfg * (ours - negative))}
    for model, (scale, expected) in wanted.items():
        error = float((first_step(model, setting.target, scale) - expected).abs().mean())
        assert error < 0.01 * effect, (error, effect)


@pytest.mark.usefixtures("own_folders")
def test_a_model_with_a_t_lora_is_trained_further_but_not_with_checkpointing():
    setting = Setting()
    setting.model, _, _, first = train(setting, lora_type="T-LoRA", learning_rate=0.05, patches=False)
    assert train(setting, patches=False)[3] != first
    with pytest.raises(ValueError, match="carries a T-LoRA.*switch checkpointing off"):
        train(setting, patches=False, checkpointing=True, seed=1)
