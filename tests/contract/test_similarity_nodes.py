"""Likeness To Images, Load Instance Retrieval and Optimize LoRA as nodes: what goes in, and what is said of it."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from .. import tiny_models
from ..vision.models import clip_folder
from .methods import autoencoder, run_node
from .setting import SharedSetting as Setting
from .test_contract import own_user_folder  # noqa: F401  (a fixture)
from .test_likeness_optimisation import encoded, optimised, sigmas

GB = 2**30


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    from likeness.core.vision.host.vision import load_vision

    folder = tmp_path_factory.mktemp("vision") / "clip"
    clip_folder(folder)
    with torch.inference_mode():
        return load_vision(folder)


def parts(**inputs):
    from likeness.nodes.similarity import LikenessSimilarity

    return run_node(LikenessSimilarity, **{"weight": 1.0, **inputs})[0].parts


def inputs_of(setting: Setting, similarity) -> dict:
    return {
        "model": setting.model,
        "vae": autoencoder(),
        "positive": setting.source,
        "similarity": similarity,
        "latent": {"samples": torch.zeros(1, 4, 8, 8)},
        "sigmas": sigmas(setting, 1),
        "iterations": 3,
        "learning_rate": 0.02,
        "cfg": 1.0,
        "grad_steps": 1,
        "seed": 0,
    }


def test_the_nodes_give_model_text_encoder_lora_and_pictures(vision):
    from comfy_execution.graph_utils import ExecutionBlocker

    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    setting, clip = Setting(), tiny_models.clip_l()
    one = run_node(LikenessSimilarity, vision=vision, image=setting.image, weight=0.5)[0]
    both = run_node(LikenessSimilarity, vision=vision, image=setting.image.flip(1), weight=1.0, similarity=one)[0]
    assert [part.weight for part in both.parts] == [0.5, 1.0] and len(both.visions) == 1
    inputs = inputs_of(setting, both)
    model, encoder, lora, best, images, loss, report = run_node(LikenessOptimizeLora, **inputs)
    assert isinstance(encoder, ExecutionBlocker) and model is not setting.model and "best: iteration" in report
    assert best.shape == (1, 64, 64, 3) and images.shape == (3, 64, 64, 3) and len(loss["loss"]) == 3
    assert lora.header["method"] == "siso" and lora.header["base"]
    inputs["positive"] = encoded(clip)
    _, encoder, lora, *_ = run_node(LikenessOptimizeLora, **inputs, clip=clip, prompt="a cat", optimizer="AdamW")
    assert not isinstance(encoder, ExecutionBlocker)
    assert any(name.startswith("lora_te_") for name in lora)
    with pytest.raises(ValueError, match="mask was connected without an image"):
        run_node(LikenessOptimizeLora, **inputs, mask=torch.zeros(1, 64, 64))


def test_a_preset_is_the_same_as_its_settings_on_the_node(vision, monkeypatch):
    """To the byte, under the same key: what was trained is served for either."""
    from likeness.core.session.session import Session
    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    short = {"iterations": 2, "learning_rate": 0.01, "noise": "same"}
    monkeypatch.setattr("likeness.nodes.optimize_lora.SISO", {"fast": {"noise": short}})
    setting = Setting()
    alike = run_node(LikenessSimilarity, vision=vision, image=setting.image, weight=1.0)[0]
    inputs = inputs_of(setting, alike)
    named = run_node(LikenessOptimizeLora, **{**inputs, **short})[2]
    monkeypatch.setattr(Session, "run", None)
    served = run_node(LikenessOptimizeLora, **inputs, preset="fast", noise="new")[2]
    assert served.header == named.header and all(torch.equal(served[name], named[name]) for name in named)
    with pytest.raises(TypeError):  # as set, these are other settings: a run of its own
        run_node(LikenessOptimizeLora, **inputs, preset="as set")


def test_of_a_masked_reference_the_subject_alone_counts(vision):
    picture, mask = torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 96, 64)
    mask[:, 70:90, 40:64] = 1
    part = parts(vision=vision, image=picture, mask=mask)[0]
    size = vision.image_size
    assert part.references.shape == (1, size, size, 3)
    changed = picture.clone()
    changed[mask == 0] = 0.5
    assert torch.equal(part.references, parts(vision=vision, image=changed, mask=mask)[0].references)
    corners = part.references[0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.min()) > 0.95, "white around it"
    assert not torch.equal(part.references, parts(vision=vision, image=picture.flip(1), mask=mask)[0].references)


def test_several_references_may_share_a_mask(vision):
    pictures, mask = torch.rand(3, 64, 64, 3), torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    assert len(parts(vision=vision, image=pictures, mask=mask)[0].references) == 3
    with pytest.raises(ValueError, match="2 masks came with 3 images"):
        parts(vision=vision, image=pictures, mask=mask.repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.zeros(1, 64, 96), "mask is empty"), (torch.ones(1, 64, 64), "another proportion")],
)
def test_masks_that_do_not_fit_are_refused(vision, mask, message):
    with pytest.raises(ValueError, match=message):
        parts(vision=vision, image=torch.rand(1, 64, 96, 3), mask=mask)


def test_a_border_that_is_not_seen_is_told(vision, caplog):
    with caplog.at_level(logging.WARNING, "likeness"):
        parts(vision=vision, image=torch.rand(1, 64, 66, 3))
        assert not caplog.text
        parts(vision=vision, image=torch.rand(1, 64, 96, 3))
    assert "Only the central 64 x 64 pixels of the subject's 96 x 64 image" in caplog.text


def test_a_picture_that_holds_no_numbers_is_refused(vision):
    with pytest.raises(ValueError, match="NaN or infinite"):
        parts(vision=vision, image=torch.full((1, 64, 64, 3), float("nan")))


def test_retrieval_weights_that_are_not_there_are_told_before_anything_runs():
    from likeness.nodes.similarity import LikenessLoadRetrievalModel

    told = LikenessLoadRetrievalModel.validate_inputs("ir_features.pth")
    assert all(word in told for word in ("'ir_features.pth'", "models/ir_features", "kaggle.com", "licence", "press R"))


def test_a_model_larger_than_the_memory_is_refused_before_it_is_loaded(vision, monkeypatch):
    from likeness.core.session import memory, session

    monkeypatch.setattr(memory.mm, "get_total_memory", lambda _device: 1000)
    monkeypatch.setattr(session, "load_fully", None)
    with pytest.raises(RuntimeError, match="must fit all at once"):
        optimised(Setting(), vision)


def test_an_estimate_above_the_memory_is_told_with_what_to_change(vision, monkeypatch, caplog):
    from likeness.core.session import memory

    monkeypatch.setattr(memory.mm, "get_total_memory", lambda _device: GB)
    with caplog.at_level(logging.WARNING, "likeness"):
        memory.check_room([], 0.5 * GB, torch.device("cpu"))
        assert not caplog.text
        memory.check_room([], 2 * GB, torch.device("cpu"))
    assert "may need about 2.0 GB" in caplog.text and "switch checkpointing on" in caplog.text


class Weights:
    """A ModelPatcher as far as memory is concerned."""

    def __init__(self, device: str) -> None:
        self.load_device = torch.device(device)

    def model_size(self) -> float:
        return GB


def test_models_on_other_devices_need_no_memory_of_this_one(monkeypatch):
    from likeness.core.session import memory

    monkeypatch.setattr(memory.mm, "get_total_memory", lambda _device: 1.5 * GB)
    memory.check_room([Weights("cuda"), Weights("cpu")], 0.0, torch.device("cuda"))
    with pytest.raises(RuntimeError, match="2.0 GB of weights"):
        memory.check_room([Weights("cuda"), Weights("cuda")], 0.0, torch.device("cuda"))


def test_a_text_encoder_that_learns_is_counted_twice(vision, monkeypatch):
    """Its weights, and the copies of them that a gradient goes through."""
    from likeness.core.session import session

    counted = []

    def seen(models, needed, _device):
        counted.append((len(models), needed))
        raise RuntimeError("stopped")

    monkeypatch.setattr(session, "check_room", seen)
    clip, setting = tiny_models.clip_l(), Setting()
    setting.source = encoded(clip)
    for encoder in (None, clip):
        with pytest.raises(RuntimeError, match="stopped"):
            optimised(setting, vision, clip=encoder)
    (without, needed), (with_text, more) = counted
    assert with_text == without + 1 and more - needed == pytest.approx(clip.patcher.model_size())


def test_running_out_of_memory_says_what_to_change():
    from likeness.core.session.memory import explain_out_of_memory, mm

    with pytest.raises(mm.OOM_EXCEPTION, match="switch checkpointing on"), explain_out_of_memory():
        raise mm.OOM_EXCEPTION("no room")


def test_checkpointing_is_estimated_lower(vision):
    from likeness.core.session.memory import activations, decoding_memory, vision_memory

    latent = torch.zeros(1, 4, 8, 8)
    for estimate in (
        lambda on: vision_memory(vision, on),
        lambda on: activations(tiny_models.sd1(), latent, on),
        lambda on: decoding_memory(autoencoder(), latent, on),
    ):
        assert 0 < estimate(True) < estimate(False)


def test_a_model_that_computes_in_float32_for_an_edit_is_estimated_higher():
    from likeness.core.session.memory import activations

    latent, stored, exact = torch.zeros(1, 4, 8, 8), tiny_models.sd1(), tiny_models.sd1()
    stored.set_model_compute_dtype(torch.bfloat16)
    exact.set_model_compute_dtype(torch.float32)
    assert activations(exact, latent, False) == 2 * activations(stored, latent, False)


def test_a_loss_that_never_falls_is_told(vision, caplog, monkeypatch):
    from likeness.core.siso.host import similarity
    from likeness.core.siso.siso import similarity_loss

    rising = itertools.count()
    monkeypatch.setattr(similarity, "similarity_loss", lambda *features: similarity_loss(*features) + next(rising))
    with caplog.at_level(logging.WARNING, "likeness"):
        found = optimised(Setting(), vision, iterations=3)
    assert found.best == 0 and "changes nothing: try another learning rate" in found.report()
    assert "changes nothing" in caplog.text


def test_a_latent_or_vae_of_another_model_is_refused(vision, monkeypatch):
    from likeness.core.session.session import Session
    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    monkeypatch.setattr(Session, "run", None)
    setting = Setting()
    alike = run_node(LikenessSimilarity, vision=vision, image=setting.image, weight=1.0)[0]
    inputs = inputs_of(setting, alike)
    with pytest.raises(ValueError, match="The VAE's latents have 16 channels, the model's 4"):
        run_node(LikenessOptimizeLora, **{**inputs, "vae": tiny_models.taesd(channels=16)})
    with pytest.raises(ValueError, match=r"The latent is \(1, 16, 8, 8\), the model expects \[batch, 4"):
        run_node(LikenessOptimizeLora, **{**inputs, "latent": {"samples": torch.ones(1, 16, 8, 8)}})
    with pytest.raises(ValueError, match="no CLIP part"):
        encoder = tiny_models.clip_l()
        encoder.cond_stage_model = torch.nn.Identity()
        run_node(LikenessOptimizeLora, **inputs, clip=encoder, prompt="a cat")
