"""The shipped graphs of today's transformers, on tiny random ones: what they show, by numbers."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toyworld import workflows

from .. import live
from .results import distance, pixels

SHOWN = {
    "9 Lab - HiPer - FLUX.1": ("Edit without the subject", "Edit with the subject"),
    "9 Lab - HiPer - Z-Image": ("Edit without the subject", "Edit with the subject"),
    "9 Lab - LoRA - one image Qwen-Image": ("Without the LoRA", "With the LoRA"),
    "9 Lab - LoRA - one image Z-Image": ("Without the LoRA", "With the LoRA"),
    "9 Lab - LoRA - guidance (FLUX.1)": ("LoRA alone", "Guided"),
    "9 Lab - LoRA - guidance (Z-Image, Qwen-Image)": ("LoRA alone", "Guided", "Personalization guidance"),
    "9 Lab - Inversion - Qwen-Image": ("The image again", "Edit"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_each_image_is_another_one(results, name):
    shown = [results[name].pictures(title)[0] for title in SHOWN[name]]
    for index, image in enumerate(shown):
        assert image.shape == (workflows.SIZE, workflows.SIZE, 3) and image.std() > 0.01
        assert all(distance(image, other) > 1e-4 for other in shown[:index])


@pytest.mark.parametrize("name", ["9 Lab - LoRA - one image Qwen-Image", "9 Lab - LoRA - one image Z-Image"])
def test_the_saved_lora_has_the_keys_that_comfyui_reads_for_every_model(server, results, name):
    file = server.base / "models" / "loras" / results[name].text("Save the LoRA").splitlines()[0]
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
    assert keys and all(key.startswith("diffusion_model.") for key in keys)


def test_the_way_back_loses_nothing(server):
    """But for what the autoencoder loses."""
    name, object_info = "9 Lab - Inversion - Qwen-Image", server.object_info()
    graph = live.lowered(name, object_info)
    prompt = convert(graph, object_info)
    vae, scaled = (workflows.node_id(graph, title) for title in ("Autoencoder", "To the model's size"))
    prompt["900"] = {"class_type": "VAEEncode", "inputs": {"pixels": [scaled, 0], "vae": [vae, 0]}}
    prompt["901"] = {"class_type": "VAEDecode", "inputs": {"samples": ["900", 0], "vae": [vae, 0]}}
    prompt["902"] = {"class_type": "PreviewImage", "inputs": {"images": ["901", 0]}}
    again = workflows.node_id(graph, "The image again")
    run = server.run(with_ancestors(prompt, ["902", again]))
    lossless, found = (pixels(server.images(run, node)[0]) for node in ("902", again))
    assert abs(found - lossless).max() <= 2 / 255
