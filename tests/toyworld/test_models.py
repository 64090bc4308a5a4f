"""The committed models: their hashes, exact widening through the stock loader, and that they do their work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from likeness.toyworld import assets, judge, world
from likeness.toyworld.dataset import render_scenes

from .. import inprocess


def renders(count: int) -> tuple[torch.Tensor, torch.Tensor, list[world.Scene]]:
    scenes = [world.scene(seed, from_held_out=True) for seed in range(count)]
    pictures = torch.from_numpy(np.stack([made.image for made in scenes])).permute(0, 3, 1, 2).float() / 255
    return pictures, torch.from_numpy(np.stack([made.mask for made in scenes])).float() / 255, scenes


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    inprocess.start()
    from likeness.toyworld.build import build

    return build(tmp_path_factory.mktemp("models"))


def test_assets_are_the_listed_ones_and_small(tmp_path: Path) -> None:
    assets.check()
    assert sum(file.stat().st_size for file in assets.ASSETS.iterdir()) < 35e6
    copy = tmp_path / "judge.safetensors"
    copy.write_bytes((assets.ASSETS / "judge.safetensors").read_bytes()[:-1] + b"x")
    (tmp_path / assets.HASHES).write_text((assets.ASSETS / assets.HASHES).read_text())
    with pytest.raises(RuntimeError, match="check the clone out again"):
        assets.check(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint", "turbo"])
def test_the_stock_loader_gives_the_narrow_models_function(name: str, built: dict[str, Path]) -> None:
    import comfy.model_management
    import comfy.sd

    from likeness.toyworld.narrow import load_narrow, load_stock

    loaded = comfy.sd.load_checkpoint_guess_config(str(built[name]), output_vae=True, output_clip=True)
    model, clip, vae = loaded[:3]
    narrow = load_narrow(student=name == "turbo")
    with torch.inference_mode():  # as a node does
        own_model, own_clip, own_vae = load_stock(student=name == "turbo")
    prompt = "a photo of a dark red striped dog with white stripes in the snow, zebra"
    generator = torch.Generator().manual_seed(0)
    latent, times = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5.0, 800.0])
    picture = torch.rand(1, 48, 48, 3, generator=generator)
    with torch.no_grad():
        wide = clip.encode_from_tokens(clip.tokenize(prompt))
        small = narrow.encode(prompt)
        assert torch.allclose(wide, small.repeat_interleave(8, 2), atol=1e-4)
        assert torch.allclose(own_clip.encode_from_tokens(own_clip.tokenize(prompt)), small, atol=1e-4)
        comfy.model_management.load_models_gpu([model, narrow.model, own_model])
        expected = model.model.apply_model(latent, times, c_crossattn=wide.expand(2, -1, -1))
        found = narrow.model.model.apply_model(latent, times, c_crossattn=small.expand(2, -1, -1))
        assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())
        assert torch.equal(own_model.model.apply_model(latent, times, c_crossattn=small.expand(2, -1, -1)), found)
        encoded = vae.encode(picture)
        decoded = vae.decode(encoded)
        assert torch.allclose(encoded, narrow.vae.encode(picture), atol=1e-4)
        assert torch.allclose(decoded, narrow.vae.decode(encoded), atol=1e-4)
        assert torch.allclose(own_vae.encode(picture), encoded, atol=1e-4)
        assert torch.allclose(own_vae.decode(encoded), decoded, atol=1e-4)


def test_the_judge_reads_held_out_scenes() -> None:
    pictures, masks, scenes = renders(64)
    trained = judge.load_judge()
    answers = trained.attributes(pictures)
    right = np.mean(
        [world.CLASSES[int(a)] == made.identity.cls for a, made in zip(answers["class"], scenes, strict=True)]
    )
    assert right > 0.9
    found = trained.mask(pictures) > 0.5
    overlap = (found & (masks > 0.5)).sum() / (found | (masks > 0.5)).sum()
    assert float(overlap) > 0.85


def test_the_crop_is_the_subject_alone_on_white() -> None:
    pictures, masks, _ = renders(4)
    crops = judge.subject_crop(pictures, masks, 64)
    assert crops.shape == (4, 3, 64, 64)
    assert float(crops[:, :, 0, 0].min()) > 0.95 and float(crops.min()) < 0.5
    empty = judge.subject_crop(pictures[:1], torch.zeros(1, 96, 96), 64)
    assert float(empty.min()) > 0.999
    with pytest.raises(ValueError, match="needs"):
        judge.load_judge().attributes(torch.zeros(3, 96, 96))


def test_vision_folders_load_by_transformers_and_know_subjects_apart(built: dict[str, Path]) -> None:
    from transformers import AutoModel

    from likeness.toyworld import subjects
    from likeness.toyworld.train_encoders import hard_auc

    pictures, masks = subjects.check_scenes(10)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    crops = judge.subject_crop(images, torch.from_numpy(masks).float() / 255, 96)
    groups = (crops * 255 + 0.5).byte().view(10, 4, subjects.VIEWS, 3, 96, 96)
    for name in ("small_world_dino", "small_world_measure"):
        model = AutoModel.from_pretrained(str(built[name])).train(False)
        assert hard_auc(model, groups)["pattern or emblem"] > 0.93, name


def test_the_encoder_for_harder_subjects_knows_near_twins_apart() -> None:
    inprocess.start()
    from likeness.toyworld import subjects
    from likeness.toyworld.train_encoders import hard_auc
    from likeness.toyworld.vision_models import load_model

    pictures, masks = subjects.check_scenes(10, "fine")
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    crops = judge.subject_crop(images, torch.from_numpy(masks).float() / 255, 96)
    groups = (crops * 255 + 0.5).byte().view(10, 5, subjects.VIEWS, 3, 96, 96)
    found, first = (hard_auc(load_model(name), groups, subjects.KINDS["fine"])["all"] for name in ("fine", "measure"))
    assert found > 0.88 and found > first + 0.05


def test_the_scorer_prefers_the_true_caption(built: dict[str, Path]) -> None:
    from transformers import AutoModel, AutoTokenizer

    from likeness.toyworld.train_scorer import swap_accuracy

    folder = str(built["small_world_clip"])
    scenes = render_scenes(40, from_held_out=True, processes=1)
    images = torch.from_numpy(scenes["images"]).permute(0, 3, 1, 2).float() / 255
    found = swap_accuracy(
        AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), images, scenes["labels"]
    )
    assert min(found.values()) > 85


def test_the_mask_node_finds_the_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    inprocess.start()
    import nodes
    from likeness.nodes.score import LikenessLoadVision

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "LikenessLoadVision", LikenessLoadVision)
    folder = assets.ASSETS.parent / "comfyui_nodes"
    spec = importlib.util.spec_from_file_location("toyworld_nodes_under_test", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pictures, masks, _ = renders(2)
    found = module.ToyworldSubjectMask.execute(pictures.movedim(1, -1)).args[0]
    assert found.shape == (2, 96, 96) and set(found.unique().tolist()) == {0.0, 1.0}
    assert float((found - (masks > 0.5).float()).abs().mean()) < 0.05


@pytest.mark.parametrize(
    ("student", "steps"), [(False, 10), (True, 1), pytest.param(True, 2, marks=pytest.mark.slow), (True, 4)]
)
def test_prompts_decide_what_comfyui_samples(student: bool, steps: int) -> None:
    inprocess.start()
    import comfy.sample

    from likeness.toyworld.narrow import load_narrow

    narrow = load_narrow(student=student)
    cfg, scheduler = (1.0, "simple") if student else (4.0, "normal")
    wanted = [
        ("dog", "red", "plain", "snow"),
        ("car", "yellow", "spotted", "sand"),
        ("star", "cyan", "striped", "night"),
    ]
    trained, right = judge.load_judge(), 0
    for seed, (cls, color, texture, place) in enumerate(wanted):
        idn = world.identity(seed, cls, color, texture)
        texts = [narrow.encode(world.caption(idn, place)), narrow.encode("")]
        positive, negative = ([[text, {}]] for text in texts)
        noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))
        latent = comfy.sample.sample(
            narrow.model, noise, steps, cfg, "euler", scheduler, positive, negative, torch.zeros_like(noise), seed=seed
        )
        answers = trained.attributes(narrow.vae.decode(latent).movedim(-1, 1))
        right += int(answers["class"]) == world.CLASSES.index(cls)
        right += int(answers["background"]) == list(world.BACKGROUNDS).index(place)
        right += int(answers["color"]) == list(world.COLORS).index(color)
    assert right >= 8
