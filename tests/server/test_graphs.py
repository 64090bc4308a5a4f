"""Every shipped graph runs in the small world, and its images are what they should be, by numbers."""

from __future__ import annotations

import pytest

from likeness.toolbox.graph import convert
from likeness.toyworld import workflows

from .. import live
from .results import SAID, UNWANTED, Result, check_images, distance, pixels


@pytest.mark.parametrize("name", live.NAMES)
def test_the_log_is_clean(results, name):
    log = results[name].log
    assert (SAID in log) == (name == "9 Lab - SINE - stock loader")
    lines = [line for line in log.splitlines() if SAID not in line]
    assert not [line for line in lines if any(word in line for word in UNWANTED)]


def test_train_and_edit(results, server):
    from PIL import Image

    result = results["9 Lab - HiPer - train and edit"]
    titles = ("Reconstruction", "Edit without the subject", "Edit with the subject")
    pictures = [result.pictures(title)[0] for title in titles]
    check_images([pixels(Image.open(server.base / "input" / workflows.PICTURE)), *pictures])
    assert "DINO" in result.text("Score") and "best" in result.text("Score")
    progress = result.run.of_type("likeness.progress")
    assert progress[-1]["step"] == progress[-1]["steps"] == live.STEPS
    assert len(progress[-1]["losses"]) == live.STEPS


def test_load_and_reuse(results):
    result = results["9 Lab - HiPer - load and reuse"]
    check_images([result.pictures(f"Result {index}")[0] for index in (1, 2, 3)])
    assert "tokens of width 96" in result.text("What it is")


def test_pick_the_step(results):
    result = results["9 Lab - HiPer - pick the step"]
    rows = [line for line in result.text("Choose the step").splitlines() if line.rstrip().endswith("best")]
    assert len(rows) == 1 and rows[0].split()[0] in result.text("Choose the step").splitlines()[0]
    check_images(result.pictures("Best step"))


@pytest.mark.slow
def test_a_real_photograph_goes_through_the_whole_graph(server):
    """A cat of 451 x 300 pixels, cut to size inside the graph: what is learned brings the image nearer to it."""
    from PIL import Image
    from skimage.data import chelsea

    photograph = Image.fromarray(chelsea())
    photograph.save(server.base / "input" / "photograph.png")
    object_info = server.object_info()
    settings = {
        ("LoadImage", "image"): "photograph.png",
        ("Source prompt", "text"): "a photo of a cat",
        ("LikenessTrainEmbedding", "steps"): 60,
        ("LikenessTrainEmbedding", "learning_rate"): 0.05,
    }
    graph = live.lowered("9 Lab - HiPer - train and edit", object_info, settings=settings)
    run = server.run(convert(graph, object_info))
    result = Result(server, graph, run, "")
    titles = ("Reconstruction", "Edit without the subject", "Edit with the subject")
    check_images([result.pictures(title)[0] for title in titles])
    side = min(photograph.size)
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    cut = photograph.crop((left, top, left + side, top + side)).resize((workflows.SIZE, workflows.SIZE))
    reconstruction, without, _ = (result.pictures(title)[0].mean((0, 1)) for title in titles)
    assert distance(reconstruction, pixels(cut).mean((0, 1))) < distance(without, pixels(cut).mean((0, 1)))


def test_a_finished_training_is_shared_between_graphs(results):
    data = results["9 Lab - HiPer - pick the step"].run.of_type("likeness.progress")
    assert all(entry["resumed"] == live.STEPS for entry in data)
