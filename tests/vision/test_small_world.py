"""The small world's vision folders load, and give the numbers that their own classes give."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from likeness.core.vision.host.vision import embed, load_vision
from likeness.tests.gradients import check_vision
from likeness.toyworld import assets, comfyui, vision_models

from .models import pictures, seeded

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folders as the set-up builds them, but with random weights: this test is about loading."""
    folder = tmp_path_factory.mktemp("small_world")
    for name, make in vision_models.MAKERS.items():
        state = seeded(make).state_dict()
        used = torch.arange(3)
        assets.write(name, vision_models.pack_clip(state, used) if name == "clip" else state, folder / "assets")
    paths = vision_models.build_vision_folders(folder / "models", folder / "assets")
    return {name: (paths[title], folder / "assets") for name, title in vision_models.FOLDERS.items()}


@pytest.mark.parametrize("name", ["dino", "measure"])
def test_identity_encoders(built, name):
    path, stored = built[name]
    images = pictures(2, vision_models.SIDE, vision_models.SIDE)
    model = vision_models.load_model(name, stored)
    with torch.no_grad():
        expected = vision_models.features(model, images.movedim(-1, 1))
    vision = load_vision(path)
    assert_close(embed(vision, images), expected, **CLOSE)
    if name == "dino":  # the other is only for measuring; its ReLU kinks make finite differences coarse
        assert check_vision(vision, images[:1]).relative_error < 0.01


def test_scorer(built):
    from transformers import CLIPTokenizer

    path, stored = built["clip"]
    images, texts = pictures(2, vision_models.SIDE, vision_models.SIDE), ["a red cat", "a striped mug on the beach"]
    model, vision = vision_models.load_model("clip", stored), load_vision(path)
    tokens = CLIPTokenizer.from_pretrained(str(comfyui.tokenizer_path()))(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(vision_models.normalise(images.movedim(-1, 1))).pooler_output)
        read = model.text_projection(model.text_model(**tokens).pooler_output)
    assert_close(embed(vision, images), seen, **CLOSE)
    assert_close(vision.encode_text(texts), read, **CLOSE)
