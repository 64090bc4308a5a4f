"""The kinds of a LoRA: what they train, what the stock loader makes of their files, and the mask of a T-LoRA."""

from __future__ import annotations

import pytest
import torch

from likeness.core.lora.timestep_rank import MARKER

from .. import tiny_families
from .methods import run_node
from .test_families import each_family, image_of, predicted

FAMILIES = tiny_families.families()


def lora_of(family, kind: str, **changes) -> tuple:
    from likeness.nodes.fine_tune import LikenessFineTune

    inputs = {"model": family.model(), "vae": family.autoencoder(), "image": image_of(family), "patches": False}
    inputs |= {"positive": family.prompt(1), "prompt": "photo of a sks dog", "steps": 2, "learning_rate": 0.05}
    inputs |= {"rank": 4, "resolution": family.image, "seed": 0, "whole_image": 0.0, "recon_weight": 0.0, "cells": 0}
    inputs |= {"interpolation": "bilinear", "crops": 5, "prior_weight": 0.0, "prior_prompt": "", "method": "LoRA"}
    return run_node(LikenessFineTune, checkpointing=False, lora_type=kind, **{**inputs, **changes})


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("kind", ["T-LoRA", "LoKr"])
@each_family
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
