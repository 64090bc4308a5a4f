"""Detectors, segment-anything and captions: the libraries' own answers, choices, and refusals with a remedy."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import clip_boxes_to_image

from likeness.core.vision import boxes as geometry
from likeness.core.vision.host.extras import caption, grounding, sam
from likeness.core.vision.host.subject_masks import captions, subject_masks
from likeness.core.vision.host.vision import describe, load_vision

from . import finders
from .models import dino_folder, pictures, seeded

PICTURE = (pictures(1, 48, 64)[0] * 255).byte().numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Grounding DINO."""
    path = tmp_path_factory.mktemp("models") / "dino"
    finders.grounding_dino_folder(path)
    return path


@pytest.fixture
def small_sam(monkeypatch, tmp_path):
    """segment-anything's own classes at 64 px in place of the smallest network; returns a file of such weights."""
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", finders.small_sam)
    path = tmp_path / "sam_small.pth"
    finders.sam_file(path)
    return path


def test_boxes_are_the_librarys(folder):
    """Scores, boxes and words against the post-processing of transformers."""
    detector = grounding.load_detector(folder)
    with torch.no_grad():
        found = detector(PICTURE, "Red dog", 0.4, 0.3)
        inputs = detector.processor(images=PICTURE, text=["red dog."], return_tensors="pt")
        output = detector.model(**inputs)
    expected = detector.processor.post_process_grounded_object_detection(
        output, inputs["input_ids"], threshold=0.4, text_threshold=0.3, target_sizes=[(48, 64)]
    )[0]
    order = expected["scores"].argsort(descending=True)
    assert len(order) > 2
    assert_close(found.scores, expected["scores"][order])
    assert_close(found.boxes, expected["boxes"][order].clamp(min=0), atol=1e-3, rtol=0)
    words = [re.sub(r"\[[A-Z]+\]|\.", "", text) for text in expected["text_labels"]]
    assert [label.split() for label in found.labels] == [words[index].split() for index in order]
    assert found.highest == pytest.approx(float(expected["scores"].max()))


@pytest.mark.parametrize("version", [1, 2])
def test_owl_boxes_are_the_librarys(tmp_path, version):
    finders.owl_folder(tmp_path / "owl", version)
    detector = grounding.load_detector(tmp_path / "owl")
    with torch.no_grad():
        found = detector(PICTURE, "red dog", 0.0, 0.0)
        inputs = detector.processor(images=PICTURE, text=["a photo of a red dog"], return_tensors="pt")
        output = detector.model(**inputs)
    expected = detector.processor.image_processor.post_process_object_detection(output, 0.0, [(48, 64)])[0]
    known = [[round(edge, 2) for edge in box] for box in clip_boxes_to_image(expected["boxes"], (48, 64)).tolist()]
    assert len(found.boxes) and all([round(edge, 2) for edge in box] in known for box in found.boxes.tolist())


def test_masks_of_the_best_and_of_all(folder, small_sam, caplog):
    images = pictures(2, 48, 64)
    best, drawn, info = subject_masks(images, folder, small_sam, "red dog", 0.4)
    every, *_ = subject_masks(images, folder, small_sam, "red dog", 0.4, choose=geometry.ALL)
    assert best.shape == (2, 48, 64) and drawn.shape == (2, 48, 64, 3)
    assert set(best.unique().tolist()) <= {0.0, 1.0}
    assert bool((every >= best).all()) and float(every.sum()) > float(best.sum())
    assert re.search(r"image 0: red dog 1\.00 at .* \d+ found, taken: number 0 \(best\); mask", info)
    assert "image 1:" in info and "sam_small.pth (vit_b)" in info
    assert float((drawn - images).abs().mean()) > 0.01
    assert "memory leak" not in caplog.text


def test_the_mask_is_segment_anythings_own_in_that_box(folder, small_sam):
    from segment_anything import SamPredictor, sam_model_registry

    images = pictures(1, 48, 64)
    found, *_ = subject_masks(images, folder, small_sam, "dog", 0.4)
    network = sam_model_registry["vit_b"]()
    network.load_state_dict(torch.load(small_sam, weights_only=True))
    predictor = SamPredictor(network.train(False))
    with torch.no_grad():
        pixels = (images[0] * 255).round().byte().numpy()
        box = grounding.load_detector(folder)(pixels, "dog", 0.4, 0.25).boxes[0]
        predictor.set_image(pixels)
        mask, _, _ = predictor.predict(box=box.numpy(), multimask_output=False)
    assert_close(found[0], torch.from_numpy(mask[0]).float())


def test_a_subject_that_is_not_there(folder, small_sam):
    with pytest.raises(
        ValueError, match=r"No 'cat' above the box_threshold of 1 was found in image 0 \(best score [01]\.\d+"
    ):
        subject_masks(pictures(1, 48, 64), folder, small_sam, "cat", 1.0)


@pytest.mark.parametrize(("subject", "expected"), [(" . ", "is empty"), ("dog " * 40, "tokens, .* takes 32: name it")])
def test_subjects_that_cannot_be_looked_for(folder, small_sam, subject, expected):
    with pytest.raises(ValueError, match=expected):
        subject_masks(pictures(1), folder, small_sam, subject)


def test_the_variant_is_told_from_the_weights(tmp_path):
    """Whole ViT-B weights, as .pth and as safetensors, read as a node reads them; nothing is predicted."""
    from safetensors.torch import save_file

    network = finders.sam_file(tmp_path / "any.pth")
    save_file(network.state_dict(), tmp_path / "any.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with torch.inference_mode():
            loaded = sam.load_sam(path)
        assert loaded.description == f"{path.name} (vit_b)"
        assert all(torch.equal(value, loaded.sam.state_dict()[name]) for name, value in network.state_dict().items())
        assert not any(value.requires_grad for value in loaded.parameters())


def test_files_that_are_not_segment_anythings(tmp_path, small_sam):
    tensors = torch.load(small_sam, weights_only=True)
    cases = {
        "another network": ({"weight": torch.zeros(2)}, "does not hold a segment-anything model"),
        "another width": ({**tensors, sam.VARIANT_KEY: torch.zeros(1, 4, 4, 384)}, "does not hold a segment-anything"),
        "lacking": ({k: v for k, v in tensors.items() if "neck" not in k}, "does not fit segment-anything's vit_b"),
        "no table": ([1, 2], "holds no table of weights"),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(ValueError, match=expected):
            sam.load_sam(path)
    (tmp_path / "garbage.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        sam.load_sam(tmp_path / "garbage.pth")


class Runs:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    torch.save({sam.VARIANT_KEY: Runs(tmp_path / "written")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        sam.load_sam(tmp_path / "evil.pth")
    assert not (tmp_path / "written").exists()


def test_what_is_wrong_with_segment_anything_is_said_before_anything_is_looked_for(
    tmp_path, folder, small_sam, monkeypatch
):
    def refuse(_path):
        raise AssertionError("it was looked for the subject for nothing")

    monkeypatch.setattr(grounding, "load_detector", refuse)
    tensors = torch.load(small_sam, weights_only=True)
    torch.save({k: v for k, v in tensors.items() if "neck" not in k}, tmp_path / "lacking.pth")
    with pytest.raises(ValueError, match="does not fit segment-anything's vit_b"):
        subject_masks(pictures(1), folder, tmp_path / "lacking.pth", "dog")
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(RuntimeError, match="pip install segment-anything.*MASK from another node"):
        subject_masks(pictures(1), folder, small_sam, "dog")


def test_captions_are_the_librarys(tmp_path):
    model = finders.blip2_folder(tmp_path / "blip2", seed=1)
    words = captions(pictures(2), tmp_path / "blip2", 5)
    processor = caption.read_processor(tmp_path / "blip2")
    pixels = (pictures(2)[1] * 255).round().byte().numpy()
    with torch.no_grad():
        ids = model.generate(**processor(images=pixels, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert words[1] == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip() and len(words[1]) > 2
    assert len(words) == 2 and len(captions(pictures(1), tmp_path / "blip2", 4)[0]) < len(words[0])


def test_a_model_is_read_in_the_dtype_it_is_used_in(tmp_path, monkeypatch):
    """Not first in float32: that would be twice the memory of a large captioner."""
    import transformers

    read, original = [], transformers.AutoModelForImageTextToText.from_pretrained

    def watched(*args, **settings):
        found = original(*args, **settings)
        read.append({value.dtype for value in found[0].parameters()})
        return found

    finders.blip_folder(tmp_path / "blip")
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", watched)
    loaded = [caption.load_captioner(tmp_path / "blip", dtype) for dtype in (torch.float16, torch.float32)]
    assert read == [{each.model.dtype} for each in loaded] == [{torch.float16}, {torch.float32}]


def test_blip_writes_too(tmp_path):
    finders.blip_folder(tmp_path / "blip")
    assert captions(pictures(1), tmp_path / "blip", 6)[0]


def test_a_model_without_words_is_said(tmp_path):
    finders.blip2_folder(tmp_path / "blip2", seed=0)
    with pytest.raises(ValueError, match="has no words for image 0: write the caption yourself"):
        captions(pictures(1), tmp_path / "blip2", 5)


def test_folders_of_another_kind_are_refused(tmp_path, folder):
    dino_folder(tmp_path / "dinov2")
    for load in (grounding.load_detector, lambda path: caption.load_captioner(path, torch.float32)):
        with pytest.raises(ValueError, match="dinov2 holds Dinov2Model, expected"):
            load(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="expected one that writes captions"):
        caption.load_captioner(folder, torch.float32)


def test_incomplete_folders(tmp_path):
    finders.grounding_dino_folder(tmp_path / "dino")
    (tmp_path / "dino" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights: put the model's model.safetensors there"):
        grounding.load_detector(tmp_path / "dino")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dino" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="copy the model's whole folder"):
        grounding.load_detector(tmp_path / "dino")


def test_each_list_has_its_own_folders(tmp_path, folder, monkeypatch):
    import folder_paths

    from likeness.core.vision.host.vision import vision_names

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "likeness_vision", ([str(tmp_path)], set()))
    dino_folder(tmp_path / "dinov2")
    finders.blip_folder(tmp_path / "blip")
    finders.owl_folder(tmp_path / "owl")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[1")
    assert vision_names(grounding.is_detector) == ["owl"] and vision_names(caption.is_captioner) == ["blip"]
    assert vision_names() == ["broken", "dinov2"]


def test_dino_of_the_paper_is_a_class_token_of_the_whole_picture(tmp_path):
    """A folder as facebook/dino-vits16 is: a ViTModel without a pooling layer, and one number as the size."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = seeded(lambda: ViTModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "vits16")
    settings = {"do_resize": True, "size": 32, "do_normalize": True, "resample": 2}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "vits16" / "preprocessor_config.json").write_text(json.dumps(settings))
    vision = load_vision(tmp_path / "vits16")
    image = pictures(1, 32, 48)
    squashed = torch.nn.functional.interpolate(image.movedim(-1, 1), (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = model(pixel_values=(squashed - mean) / std).last_hidden_state[:, 0]
    assert_close(vision.encode_image(image).image_embeds, expected, atol=1e-4, rtol=1e-4)
    assert "class token" in describe(vision)
