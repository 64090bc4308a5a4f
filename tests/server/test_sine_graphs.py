"""The shipped graphs of SINE in the small world: what each of them shows, by numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from likeness.toolbox.graph import convert
from likeness.toyworld import workflows

from .. import live
from .results import Result, check_images, distance, pixels

BARELY = 2e-4  # mean distance of images that differ by a model after ten steps of tuning
THUMBNAIL = 192  # px of an image on the sweep's sheet


@pytest.fixture
def source(server) -> np.ndarray:
    return pixels(Image.open(server.base / "input" / workflows.PICTURE))


def test_edit(results, source):
    result = results["9 Lab - SINE - edit"]
    titles = ("Base model alone", "Tuned model alone", "Guided edit")
    check_images([source, *(result.pictures(title)[0] for title in titles)], apart=BARELY)
    assert "DINO" in result.text("Score") and "best" in result.text("Score")
    progress = result.run.of_type("likeness.progress")
    assert progress[-1]["step"] == progress[-1]["steps"] == live.STEPS
    assert len(progress[-1]["losses"]) == live.STEPS


def test_edit_wide(results):
    result = results["9 Lab - SINE - edit wide"]
    alone, guided = (result.pictures(f"Wide, {title}")[0] for title in ("base model alone", "guided edit"))
    assert alone.shape == guided.shape == (144, 192, 3)
    assert alone.std() > 0.03 and guided.std() > 0.03 and distance(alone, guided) > BARELY


PAIRS = {
    "9 Lab - SINE - style transfer": ("Content alone", "Content and style"),
    "9 Lab - SINE - style generation": ("Without the style", "In the style"),
    "9 Lab - SINE - remove content": ("Still there", "Removed"),
    "9 Lab - SINE - faces": ("Stylise", "Accessory", "Age"),
    "9 Lab - SINE - load and edit": ("Result 1", "Result 2", "Result 3"),
    "9 Lab - SINE - as in the paper": ("Text alone", "With a LoRA", "As in the paper", "As in the paper, on patches"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_results_of_a_graph_differ(results, source, name):
    check_images([source, *(results[name].pictures(title)[0] for title in PAIRS[name])], apart=BARELY)


def test_a_saved_model_edits_as_the_one_it_was_saved_from(results):
    made = results["9 Lab - SINE - edit"].pictures("Guided edit")[0]
    loaded = results["9 Lab - SINE - load and edit"].pictures("Result 1")[0]
    assert np.abs(made - loaded).max() <= 1 / 255
    assert distance(made, results["9 Lab - SINE - edit"].pictures("Base model alone")[0]) > BARELY
    assert "sks" in results["9 Lab - SINE - load and edit"].text("What it is")


def test_a_stock_loader_and_the_map_edit_as_the_guider_did(results):
    """KSampler with a MODEL patch against SamplerCustomAdvanced with a guider, on a model that was tuned on patches."""
    made = results["9 Lab - SINE - edit wide"].pictures("Wide, guided edit")[0]
    assert np.abs(made - results["9 Lab - SINE - stock loader"].pictures("Guided edit")[0]).max() <= 1 / 255


def test_sweep_lays_every_pair_into_its_cell(results):
    """Columns v 0.3, 0.7 and rows K 400, 200: the second cell has the settings of the edit graph, and its image."""
    grid = results["9 Lab - SINE - sweep"].pictures("Grid")[0]
    edit = Image.fromarray((results["9 Lab - SINE - edit"].pictures("Guided edit")[0] * 255).round().astype(np.uint8))
    wanted = pixels(edit.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))
    step, height, width = THUMBNAIL + 8, *grid.shape[:2]
    cells = [
        grid[y : y + THUMBNAIL, x : x + THUMBNAIL]
        for y in (height - 8 - 2 * step, height - 8 - step)
        for x in (width - 8 - 2 * step, width - 8 - step)
    ]
    assert all(cell.std() > 0.03 for cell in cells)
    assert all(distance(a, b) > BARELY for i, a in enumerate(cells) for b in cells[:i])
    assert distance(cells[1], wanted) < 0.004 and distance(cells[1], wanted) == min(distance(c, wanted) for c in cells)


def test_sweep_maps_every_node_over_the_pairs(results):
    result = results["9 Lab - SINE - sweep"]
    assert len(result.run.outputs[workflows.node_id(result.graph, "Score")]["text"]) == 4
    curves = result.pictures("Curves")[0]
    assert curves.shape == (2 * 288, 2 * 526, 3), "two measures over two axes"
    assert curves.std() > 0.05


def test_sweep_of_several_images_averages_their_scores(results):
    """Two pairs of two images each: every image is scored, a cell holds both, and the curves are those of the means."""
    result = results["9 Lab - SINE - sweep of several images"]
    assert len(result.run.outputs[workflows.node_id(result.graph, "Score")]["text"]) == 4
    grid = result.pictures("Grid")[0]
    side = workflows.SIZE
    cells = [grid[-8 - side : -8, -8 - 2 * (2 * side + 8) + i * (2 * side + 8) :][:, : 2 * side] for i in (0, 1)]
    halves = [half for cell in cells for half in (cell[:, :side], cell[:, side:])]
    assert all(half.std() > 0.03 for half in halves)
    assert all(distance(a, b) > BARELY for i, a in enumerate(halves) for b in halves[:i])
    assert result.pictures("Curves")[0].std() > 0.05


def test_one_training_serves_all_graphs(results):
    """The sweep, the faces and the edit are tuned on the same image with the same settings."""
    for name in ("9 Lab - SINE - sweep", "9 Lab - SINE - faces"):
        assert all(entry["resumed"] == live.STEPS for entry in results[name].run.of_type("likeness.progress"))


@pytest.mark.slow
def test_guidance_brings_the_edit_nearer_to_the_picture(server, source):
    """With a model that has learned the image in some seconds."""
    object_info = server.object_info()
    settings = {
        ("LikenessFineTune", "steps"): 80,
        ("LikenessGuidance", "base_weight"): 0.4,
        ("KSampler", "steps"): 10,
    }
    graph = live.lowered("9 Lab - SINE - edit", object_info, settings=settings)
    run = server.run(convert(graph, object_info))
    losses = np.array(run.of_type("likeness.progress")[-1]["losses"])
    assert losses[-20:].mean() < 0.7 * losses[:20].mean()
    result = Result(server, graph, run, "")
    alone, guided = (result.pictures(title)[0] for title in ("Base model alone", "Guided edit"))
    assert distance(guided, source) < 0.9 * distance(alone, source)
