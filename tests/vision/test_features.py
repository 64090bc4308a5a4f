"""Features with a gradient, of our objects and of ComfyUI's: values, and finite differences."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from likeness.core.session.checkpointing import layers_checkpointed
from likeness.core.vision.host.vision import (
    describe,
    embed,
    features,
    load_retrieval_model,
    load_vision,
    text_missing,
)
from likeness.core.vision.preprocess import Preprocess
from likeness.tests.gradients import check_vision, differentiable

from .models import CLIP_SIDE, clip_folder, core_vision, dino_folder, open_clip_file, pictures
from .test_retrieval import published

KINDS = ["clip", "dino", "open_clip", "core_clip", "core_dino"]


def make(kind: str, folder):
    if kind.startswith("core"):
        return core_vision(folder, dino=kind == "core_dino")
    if kind == "retrieval":
        save_file(published(), folder / "retrieval.safetensors")
        return load_retrieval_model(folder / "retrieval.safetensors")
    if kind == "open_clip":
        return load_vision(open_clip_file(folder / kind)[0])
    (clip_folder if kind == "clip" else dino_folder)(folder / kind)
    return load_vision(folder / kind)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", [*KINDS, "retrieval"])
def test_gradient_equals_finite_differences(kind, checkpointing, tmp_path):
    vision = make(kind, tmp_path)
    images = pictures(1, 36, 44)
    weights = [(name, value) for name, value in vision.model.named_parameters()]
    with torch.inference_mode():  # as a node is run
        check = check_vision(vision, images, checkpointing=checkpointing)
    assert check.relative_error < 0.01, check
    assert abs(check.analytic) > 1e-4, "a zero slope would agree with anything"
    assert all(value is vision.model.get_parameter(name) for name, value in weights), "the weights must come back"
    assert not any(part._forward_pre_hooks or "forward" in vars(part) for part in vision.model.modules())


@pytest.mark.parametrize("kind", [*KINDS, "retrieval"])
def test_checkpointing_keeps_less_for_the_backward_pass(kind, tmp_path):
    vision = make(kind, tmp_path)
    kept = []

    def run() -> int:
        kept.clear()
        point = pictures(1, 36, 44).requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
            features(vision, point).sum()
        return sum(kept)

    with differentiable(vision.patcher):
        plain = run()
        with layers_checkpointed(vision.model):
            assert run() < 0.7 * plain


@pytest.mark.parametrize("kind", ["core_clip", "core_dino"])
def test_features_agree_with_comfyuis_encode_image(kind, tmp_path):
    vision = make(kind, tmp_path)
    images = (
        pictures(2, vision.image_size, vision.image_size) * 255
    ).round() / 255  # so that its rounding changes nothing
    with torch.inference_mode():
        expected = vision.encode_image(images).image_embeds
        assert_close(embed(vision, images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["core_clip", "clip"])
def test_every_picture_of_a_batch_is_seen_alone(kind, tmp_path):
    vision = make(kind, tmp_path)
    images = pictures(11)  # more than one forward pass
    alone = torch.cat([embed(vision, image[None]) for image in images])
    assert_close(embed(vision, images), alone, atol=1e-5, rtol=1e-5)


def test_rounding_is_absent(tmp_path):
    vision = make("core_clip", tmp_path)
    image = pictures(1, CLIP_SIDE, CLIP_SIDE)
    nudged = image + 1e-4  # far below one grey level
    with torch.inference_mode():
        assert torch.equal(vision.encode_image(image).image_embeds, vision.encode_image(image).image_embeds)
        with differentiable(vision.patcher):
            assert float((features(vision, image) - features(vision, nudged)).abs().max()) > 1e-6


def test_comfyuis_own_object_has_no_text(tmp_path):
    vision = make("core_clip", tmp_path)
    assert "no text encoder" in text_missing(vision) and "width 16" in describe(vision)


def test_preprocess_crops_the_centre_and_normalises():
    preprocess = Preprocess(8, 8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    image = torch.zeros(1, 8, 12, 4)
    image[:, :, 2:10] = 1.0
    expected = torch.tensor([2.0, 1.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert_close(preprocess(image), expected)
    squashed = preprocess(image, crop=False)
    assert squashed.shape == (1, 3, 8, 8) and float(squashed[0, 2, 4, 0]) < 0.0


def test_preprocess_equals_torchs_antialiased_bicubic():
    image = pictures(1, 30, 50, seed=3)
    preprocess = Preprocess(12, 16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    resized = torch.nn.functional.interpolate(image.movedim(-1, 1), (16, 27), mode="bicubic", antialias=True)
    assert_close(preprocess(image), resized[:, :, 2:14, 7:19])
