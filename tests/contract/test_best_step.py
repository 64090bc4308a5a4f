"""The step that Choose Best Step takes, its images, and what is not drawn a second time."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models
from ..vision.models import dino_folder
from .methods import run_node
from .setting import Setting
from .test_embedding_nodes import train

pytestmark = pytest.mark.usefixtures("own_folders")
QUICK = {"images": 2, "most_steps": 2, "scale": 0.8, "seed": 3, "steps": 2, "cfg": 2.0}


@pytest.fixture
def dino(tmp_path):
    from likeness.core.vision.host.vision import load_vision

    dino_folder(tmp_path / "dino")
    return load_vision(tmp_path / "dino")


def choose(setting: Setting, embedding, **inputs) -> tuple:
    from likeness.nodes.best_step import LikenessBestStep

    things = {"positive": setting.target, "latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}
    things |= {"vae": tiny_models.taesd(), "reference": setting.image, "negative": setting.empty}
    return run_node(LikenessBestStep, model=setting.model, embedding=embedding, **{**things, **QUICK, **inputs})


def test_the_most_alike_step_becomes_step_0(dino, monkeypatch):
    from likeness.core.embedding.host import best_step
    from likeness.core.vision.host.scoring import Scores

    setting = Setting()
    embedding = train(setting, preview_steps=0)[0]
    chosen, step, images, report = choose(setting, embedding, dino=dino)
    assert images.shape == (6, 64, 64, 3) and step in (2, 4) and embedding.recommended_step == 4
    assert chosen.recommended_step == step and chosen.rows is embedding.rows and "best" not in embedding.header
    table = [line.split() for line in report.splitlines() if line.split()[0] in ("2", "4")]
    assert [row[0] for row in table if row[-1] == "best"] == [str(step)] and len(table) == 2

    def alike(values):
        monkeypatch.setattr(best_step, "score", lambda _: Scores({"dino": values}, [0], "", {}))
        return choose(setting, embedding, dino=dino)[1]

    assert alike([0.0, 0.0, 0.6, 0.7, 0.5, 0.6]) == 2 and alike([9.0, 9.0, 0.5, 0.6, 0.5, 0.6]) == 4


def best(**scores: list[list[float]]) -> int:
    from likeness.core.embedding.host.best_step import best_of

    return best_of({name: torch.tensor(rows, dtype=torch.float64) for name, rows in scores.items()})


def test_a_likeness_bought_with_the_prompt_is_not_chosen():
    assert best(dino=[[0.1], [0.9], [0.5], [0.4]], clip_t=[[0.9], [0.2], [0.6], [0.5]]) == 1
    assert (
        best(dino=[[0.1], [0.3], [0.2], [0.5]], clip_i=[[0.1], [0.3], [0.8], [0.3]], clip_t=[[0], [6], [7], [5]]) == 1
    )
    assert best(dino=[[0.1], [0.3], [0.3], [0.3]]) == 2


def test_a_step_that_is_more_alike_in_some_images_alone_is_not_chosen():
    without = [0.0, 0.0, 0.0]
    last = [0.5, 0.5, 0.5]
    assert best(dino=[without, [0.7, 0.6, 0.5], last]) == 1, "0.1 more, -0.15 to 0.35 at 95 %"
    assert best(dino=[without, [0.7, 0.6, 0.65], last]) == 0, "0.15 more, 0.03 to 0.27 at 95 %"


def test_the_same_images_are_not_sampled_again(dino, monkeypatch):
    import comfy.sample

    setting, sampled = Setting(), []
    embedding = train(setting, preview_steps=0)[0]
    original = comfy.sample.sample
    monkeypatch.setattr(comfy.sample, "sample", lambda *a, **k: sampled.append(1) or original(*a, **k))
    first = choose(setting, embedding, dino=dino)
    assert len(sampled) == 6
    again = choose(setting, embedding, dino=dino)
    assert len(sampled) == 6 and torch.equal(first[2], again[2])
    choose(setting, embedding, dino=dino, scale=0.9)
    assert len(sampled) == 12


def test_without_a_vision_model_nothing_is_sampled(monkeypatch):
    import comfy.sample

    setting = Setting()
    embedding = train(setting, steps=2, preview_steps=0)[0]
    monkeypatch.setattr(comfy.sample, "sample", None)
    with pytest.raises(ValueError, match="Nothing measures likeness: connect a vision model to 'dino' or 'clip'"):
        choose(setting, embedding)


def test_the_best_step_is_in_the_file(tmp_path):
    from likeness.core.embedding.artifact import Embedding, load_embedding, save_embedding

    rows = {step: torch.zeros(1, 2, 8) for step in (2, 4)}
    save_embedding(tmp_path / "a.safetensors", Embedding(rows, {"best": 2}))
    assert load_embedding(tmp_path / "a.safetensors").recommended_step == 2
    assert "recommended 2 (best by its images)" in load_embedding(tmp_path / "a.safetensors").describe()
    for odd in (3, "2", None, True, [2]):
        assert Embedding(rows, {"best": odd}).recommended_step == 4
