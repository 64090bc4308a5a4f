"""Vision models from disk: the same numbers as their own libraries give, offline, and clear refusals."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch
from torch.testing import assert_close

from likeness.core.vision.host.vision import describe, embed, load_vision, text_missing
from likeness.core.vision.preprocess import CLIP_MEAN

from .models import (
    CLIP_SIDE,
    DINO_SIDE,
    WORDS,
    clip_config,
    clip_folder,
    dino_folder,
    open_clip_file,
    pictures,
    seeded,
    word_tokenizer,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refused(*_args):
        raise AssertionError("A vision model was loaded over the network.")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def normalised(pixels, mean, std):
    return (pixels.movedim(-1, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_clip_folder_gives_the_librarys_embeddings(tmp_path):
    model = clip_folder(tmp_path / "clip")
    images = pictures(2, CLIP_SIDE, CLIP_SIDE)  # already square, so only the normalisation lies between
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=normalised(images, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])).pooler_output
        expected = model.visual_projection(pooled)
    vision = load_vision(tmp_path / "clip")
    assert_close(embed(vision, images), expected, **CLOSE)
    assert "CLIPModel, image_embeds" in describe(vision) and text_missing(vision) is None


def test_clip_text_is_the_librarys(tmp_path):
    model = clip_folder(tmp_path / "clip")
    vision = load_vision(tmp_path / "clip")
    ids = torch.tensor([[10, 0, 3, 5, 11, 11, 11, 11, 11, 11, 11, 11]])  # begin a red cat end...
    with torch.no_grad():
        pooled = model.text_model(input_ids=ids).pooler_output
        expected = model.text_projection(pooled)
    assert_close(vision.encode_text(["a red cat"]), expected, **CLOSE)
    long = vision.encode_text(["a red cat " * 20])
    assert long.shape == (1, 8) and bool(torch.isfinite(long).all())


def test_output_is_what_other_nodes_expect_of_clip_vision(tmp_path):
    model = clip_folder(tmp_path / "clip")
    vision = load_vision(tmp_path / "clip")
    images = pictures(2, CLIP_SIDE, CLIP_SIDE)
    with torch.inference_mode():  # as a node calls it
        output = vision.encode_image(images, crop=False)
    with torch.no_grad():
        inputs = normalised(images, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
        expected = model.vision_model(pixel_values=inputs, output_hidden_states=True)
    assert_close(output["last_hidden_state"], expected.last_hidden_state, **CLOSE)
    assert_close(output.penultimate_hidden_states, expected.hidden_states[-2], **CLOSE)
    assert_close(output.image_embeds, embed(vision, images), **CLOSE)
    assert vision.patcher.model_size() > 0 and vision.patcher.model is vision.model


def test_dino_folder_gives_the_class_token(tmp_path):
    model = dino_folder(tmp_path / "dino")
    vision = load_vision(tmp_path / "dino")
    side = DINO_SIDE + 8
    images = pictures(1, side, side + 20)  # the centre crop takes its middle
    middle = images[:, 4 : 4 + DINO_SIDE, 14 : 14 + DINO_SIDE]
    with torch.no_grad():
        inputs = normalised(middle, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    assert_close(embed(vision, images), expected, **CLOSE)
    assert "Dinov2Model" in describe(vision) and "vision model only" in text_missing(vision)


def test_untrained_pooler_is_not_used(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    model = seeded(lambda: ViTModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "vit")
    vision = load_vision(tmp_path / "vit")
    images = pictures(1, 32, 32)
    with torch.no_grad():
        inputs = normalised(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        expected = model(pixel_values=inputs).last_hidden_state[:, 0]
    assert_close(embed(vision, images), expected, **CLOSE)
    assert "class token" in describe(vision)


def test_vision_with_projection_keeps_its_projection(tmp_path):
    from transformers import CLIPVisionModelWithProjection

    model = seeded(lambda: CLIPVisionModelWithProjection(clip_config().vision_config))
    model.save_pretrained(tmp_path / "projected")
    vision = load_vision(tmp_path / "projected")
    assert embed(vision, pictures(1)).shape == (1, model.config.projection_dim)
    assert "image_embeds" in describe(vision) and text_missing(vision) is not None


def test_siglip_uses_its_pooling(tmp_path, capfd):
    from transformers import SiglipConfig, SiglipModel

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**shared, "vocab_size": len(WORDS) + 3, "max_position_embeddings": 8, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**shared, "image_size": CLIP_SIDE, "patch_size": 8})
    model = seeded(lambda: SiglipModel(config))
    model.save_pretrained(tmp_path / "siglip")
    word_tokenizer().save_pretrained(tmp_path / "siglip")
    settings = {"size": {"height": CLIP_SIDE, "width": CLIP_SIDE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(settings))
    capfd.readouterr()
    vision, images = load_vision(tmp_path / "siglip"), pictures(2, CLIP_SIDE, CLIP_SIDE)
    assert capfd.readouterr().err == "", "no progress bars in ComfyUI's log"
    with torch.no_grad():
        expected = model.vision_model(pixel_values=normalised(images, [0.5] * 3, [0.5] * 3)).pooler_output
    assert_close(embed(vision, images), expected, **CLOSE)
    assert vision.encode_text(["a red cat"]).shape == (1, 16) and "SiglipModel, pooler_output" in describe(vision)


def test_squashing_folder_sees_the_whole_picture(tmp_path):
    clip_folder(tmp_path / "squash", squash=True)
    clip_folder(tmp_path / "crop")
    wide = pictures(1, CLIP_SIDE, 3 * CLIP_SIDE)
    changed = wide.clone()
    changed[:, :, :8] = 1.0 - changed[:, :, :8]  # the left edge, which a centre crop never sees
    squash, crop = load_vision(tmp_path / "squash"), load_vision(tmp_path / "crop")
    assert float((embed(squash, wide) - embed(squash, changed)).abs().max()) > 1e-3
    assert torch.equal(embed(crop, wide), embed(crop, changed))


@pytest.mark.parametrize("as_file", [True, False])
def test_open_clip_gives_the_librarys_embeddings(tmp_path, as_file):
    import open_clip

    path, model = open_clip_file(tmp_path / "mine")
    vision = load_vision(path if as_file else path.parent)
    images = pictures(2, CLIP_SIDE, CLIP_SIDE)
    with torch.no_grad():
        expected = model.encode_image(normalised(images, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
        text = model.encode_text(open_clip.SimpleTokenizer(context_length=12)(["a red cat"]))
    assert_close(embed(vision, images), expected, **CLOSE)
    assert_close(vision.encode_text(["a red cat"]), text, **CLOSE)
    output = vision.encode_image(images)
    assert output.last_hidden_state.shape == output.penultimate_hidden_states.shape == (2, 17, 16)
    assert float((output.last_hidden_state - output.penultimate_hidden_states).abs().max()) > 1e-3


def test_open_clip_file_is_known_by_its_name(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    model = seeded(lambda: open_clip.model.CLIP(**_config_of("ViT-S-32-alt")))
    path = tmp_path / "ViT-S-32-alt__mine.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    vision = load_vision(path)
    images = pictures(1, 224, 224)
    assert embed(vision, images).shape == (1, 256)
    renamed = path.rename(tmp_path / "ViT-B-32__mine.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_vision(renamed)
    with pytest.raises(
        ValueError, match="knows no model 'mystery'.* for a model of transformers, copy its whole folder"
    ):
        load_vision(renamed.rename(tmp_path / "mystery.safetensors"))


def _config_of(name):
    import open_clip

    return open_clip.get_model_config(name)


def test_loading_leaves_random_numbers_alone(tmp_path):
    dino_folder(tmp_path / "dino")
    path, _ = open_clip_file(tmp_path / "mine")  # its layers draw random weights before they are filled
    before = torch.random.get_rng_state()
    load_vision(tmp_path / "dino")
    load_vision(path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_pickled_weights_are_refused(tmp_path):
    dino_folder(tmp_path / "dino")
    (tmp_path / "dino" / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "dino" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle"):
        load_vision(tmp_path / "dino")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_vision(tmp_path / "dino" / "pytorch_model.bin")


def test_folder_without_config_is_refused(tmp_path):
    dino_folder(tmp_path / "dino")
    (tmp_path / "dino" / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        load_vision(tmp_path / "dino")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "no such model"}', "[" * 50_000])
def test_damaged_config_is_refused(tmp_path, text):
    dino_folder(tmp_path / "dino")
    (tmp_path / "dino" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="dino"):
        load_vision(tmp_path / "dino")


def test_weights_of_another_model_are_refused(tmp_path):
    dino_folder(tmp_path / "dino")
    config = json.loads((tmp_path / "dino" / "config.json").read_text())
    (tmp_path / "dino" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="lack .* tensors"):
        load_vision(tmp_path / "dino")


def test_text_only_model_is_refused(tmp_path):
    from transformers import CLIPTextModel

    seeded(lambda: CLIPTextModel(clip_config().text_config)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="takes no images"):
        load_vision(tmp_path / "text")


def test_missing_tokenizer_is_said_when_a_prompt_comes(tmp_path):
    clip_folder(tmp_path / "clip", tokenizer=False)
    vision = load_vision(tmp_path / "clip")
    with pytest.raises(ValueError, match="no tokenizer files"):
        vision.encode_text(["a red cat"])


def test_missing_library_says_how_to_install_it(tmp_path, monkeypatch):
    path, _ = open_clip_file(tmp_path / "mine")
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(RuntimeError, match="pip install open_clip_torch"):
        load_vision(path)


def test_more_layers_than_the_file_has_are_refused_before_they_are_built(tmp_path):
    dino_folder(tmp_path / "dino")
    path = tmp_path / "dino" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 100_000}))
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"asks for 100000 layers \(num_hidden_layers\), its files have \d+: copy"):
        load_vision(tmp_path / "dino")
    assert time.monotonic() - begin < 5


PREPROCESSING = {
    "a list": [1],
    "a text": "x",
    "a size of words": {"size": "abc"},
    "a size in a size": {"size": {"height": {"a": 1}}},
    "a size without end": {"size": 1e999},
    "a billion pixels": {"size": 10**9},
    "less than nothing": {"size": -3},
    "one mean": {"image_mean": [0.5]},
    "a mean that is none": {"image_mean": 0.5},
    "NaN": {"image_mean": [float("nan")] * 3},
    "a deviation of 0": {"image_std": [0.5, 0.0, 0.5]},
    "words": {"image_std": ["a", "b", "c"]},
}


@pytest.mark.parametrize("case", PREPROCESSING)
def test_preprocessing_that_makes_no_image_is_refused_when_it_is_read(tmp_path, case):
    clip_folder(tmp_path / "clip", tokenizer=False)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[case]))
    with pytest.raises(ValueError, match=r"preprocessor_config.json of clip (cannot|is|has) .*: copy it again"):
        load_vision(tmp_path / "clip")


def test_preprocessing_without_numbers_takes_the_familys(tmp_path):
    clip_folder(tmp_path / "clip", tokenizer=False)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps({"image_mean": None, "size": CLIP_SIDE}))
    assert load_vision(tmp_path / "clip").preprocess.mean == CLIP_MEAN
