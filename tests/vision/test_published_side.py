"""DINOv2 of a folder, looked at as SISO does: at the side it was trained on, not at the smaller one of its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from likeness.core.vision.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

from .models import DINO_SIDE, clip_folder, dino_folder, pictures, seeded

# What facebook/dinov2-large has in its preprocessor_config.json.
PUBLISHED = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}


def published_folder(folder: Path):
    """Its settings and sides, with a network that is narrow."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14)
    model = seeded(lambda: Dinov2Model(config))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    return model


def test_the_published_folder_is_asked_at_518(tmp_path):
    from likeness.core.session.memory import BYTES_PER_FEATURE, vision_memory
    from likeness.core.siso.host.similarity import SimilarityPart, similarity_part
    from likeness.core.vision.host.vision import load_vision
    from likeness.tests.gradients import differentiable

    model = published_folder(tmp_path)
    with torch.inference_mode():
        vision = load_vision(tmp_path)
    assert vision.image_size == 224, "what the folder says, for scores"
    subject, picture = pictures(1, 60, 80, seed=1), pictures(1, 64, 64, seed=2)
    with differentiable(vision.patcher):
        loss = SimilarityPart(vision, 1.0, subject).term()(picture.movedim(-1, 1))
    prepare = Preprocess(518, 518, IMAGENET_MEAN, IMAGENET_STD, published=True)
    with torch.no_grad():
        a, b = (model(pixel_values=prepare(each)).pooler_output for each in (subject, picture))
    assert float(loss) == pytest.approx(-float(torch.nn.functional.cosine_similarity(a, b)), abs=1e-6)
    mask = torch.zeros(1, 60, 80)
    mask[:, 20:40, 20:50] = 1
    assert similarity_part(vision, 1.0, subject, mask).references.shape == (1, 518, 518, 3)
    assert vision_memory(vision, False) == BYTES_PER_FEATURE * 37**2 * 8


@pytest.mark.parametrize(("kind", "sides"), [("dino", (DINO_SIDE, DINO_SIDE)), ("clip", (32, 32))])
def test_the_side_is_that_of_the_positions(tmp_path, kind, sides):
    from likeness.core.vision.host.vision import load_vision, published_preprocess

    (dino_folder if kind == "dino" else clip_folder)(tmp_path)
    with torch.inference_mode():
        vision = load_vision(tmp_path)
    found = published_preprocess(vision)
    assert (found.size, found.shorter_side) == sides and found.published
    assert (found.mean, found.std) == (vision.preprocess.mean, vision.preprocess.std)


def test_how_pictures_are_prepared_decides_the_run(tmp_path):
    from dataclasses import replace

    from likeness.core.fit.runs import digest
    from likeness.core.siso.host.similarity import SimilarityPart
    from likeness.core.vision.host.vision import load_vision

    clip_folder(tmp_path)
    with torch.inference_mode():
        vision = load_vision(tmp_path)
    part = SimilarityPart(vision, 1.0, pictures(1))
    before = digest(part.key_parts())
    assert digest(SimilarityPart(vision, 1.0, pictures(1)).key_parts()) == before
    vision.preprocess = replace(vision.preprocess, shorter_side=None)
    assert digest(part.key_parts()) != before
