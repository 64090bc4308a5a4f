"""The shipped graphs of EZIGen in the small world: what they show, by numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toyworld import workflows

from .. import live
from .results import UNWANTED, Result, check_images, distance, pixels, run_graph

CELL = 8  # pixels of a latent's cell


def drawn(identity, background: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of the small world in 0..1, and where its subject is."""
    from likeness.toyworld import world

    picture, coverage = world.render(identity, background, seed)
    return picture.astype(np.float32) / 255, coverage > 127


def subject_drawn() -> tuple[np.ndarray, np.ndarray]:
    return drawn(workflows.subject(), workflows.SOURCE_BACKGROUND, workflows.SUBJECT_SEED)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(-10 * np.log10(((first - second) ** 2).mean()))


def test_the_steps_by_stock_nodes_give_the_very_same_pictures(results):
    together = results["9 Lab - EZIGen - generate"].pictures("First sampling and loops")
    steps = results["9 Lab - EZIGen - steps"]
    titles = ("After the first sampling", "After loop 1", "After loop 2", "After loop 3")
    alone = [steps.pictures(title)[0] for title in titles]
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one, other)
    check_images(alone)
    assert np.array_equal(results["9 Lab - EZIGen - generate"].pictures("Result")[0], alone[-1])


def test_the_prompt_alone_has_the_same_layout(results):
    """The first sampling differs from it in its last steps only."""
    result = results["9 Lab - EZIGen - generate"]
    alone, first = result.pictures("Prompt alone")[0], result.pictures("First sampling and loops")[0]
    assert 1e-3 < distance(alone, first) < 0.15
    assert f"{live.EXACT_STEPS} steps and 3 times 2" in result.text("Report")
    assert "loop 3: 0." in result.text("Report"), "with the vision model switched on it says how alike they are"


@pytest.mark.slow
def test_the_subject_is_more_alike_than_by_the_prompt_alone(server):
    """Four images of more steps; identity by the measuring encoder, on the subject alone."""
    wanted = {title: 10 for title in ("Sample in stages", "Without the subject")}
    settings = {(title, "steps"): steps for title, steps in wanted.items()}
    result = run_graph(server, "9 Lab - EZIGen - generate", {**settings, ("Size of the results", "batch_size"): 4})
    rows = [line.split() for line in result.text("Score").splitlines() if line.split()[0].isdigit()]
    identity = np.array([float(row[1]) for row in rows])
    assert len(identity) == 8
    assert identity[4:].mean() > identity[:4].mean() + 0.1, identity


def test_what_is_looked_at_is_the_subject_alone_on_white(results):
    seen = results["9 Lab - EZIGen - generate"].pictures("What is looked at")[0]
    picture, mask = subject_drawn()
    rows, columns = np.nonzero(mask)
    assert all(corner.min() > 0.97 for corner in (seen[0, 0], seen[0, -1], seen[-1, 0], seen[-1, -1]))
    ratio = (seen.min(-1) < 0.9).mean() / (picture[rows, columns].min(-1) < 0.9).mean()
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    assert 0.5 < ratio / (mask.sum() / side**2) < 1.5, "the subject fills the square"


def test_a_painted_subject_is_cut_out(server):
    """As the graph is shipped, with what the MaskEditor saves: the image with the painted part transparent."""
    picture, mask = subject_drawn()
    painted = np.dstack([picture * 255, np.where(mask, 0, 255)]).astype(np.uint8)
    Image.fromarray(painted, "RGBA").save(server.base / "input" / "painted.png")
    object_info = server.object_info()
    settings = {("LoadImage", "image"): "painted.png", ("LikenessEncodeSubject", "size"): workflows.SIZE}
    settings["CheckpointLoaderSimple", "ckpt_name"] = workflows.CHECKPOINT
    graph = workflows.adapt(workflows.shipped("9 Lab - EZIGen - generate"), settings, object_info)
    shown = workflows.node_id(graph, "What is looked at")
    prompt = with_ancestors(convert(graph, object_info), [shown])
    assert not {node["class_type"] for node in prompt.values()} & {"LikenessSubjectMask", "JoinImageWithAlpha"}
    seen = Result(server, graph, server.run(prompt), "").pictures("What is looked at")[0]
    assert all(corner.min() > 0.97 for corner in (seen[0, 0], seen[0, -1], seen[-1, 0], seen[-1, -1]))
    inside, surface = seen[seen.min(-1) < 0.9], picture[mask]
    assert distance(inside.mean(0), surface[surface.min(-1) < 0.9].mean(0)) < 0.08
    assert distance(inside.mean(0), picture[~mask].mean(0)) > 0.15


def what_shows(title: str, graph, object_info) -> dict:
    """The part of a graph that one of its outputs needs, as the server takes it."""
    return with_ancestors(convert(graph, object_info), [workflows.node_id(graph, title)])


def test_two_pictures_of_a_person_are_not_one(server, results):
    two = results["9 Lab - EZIGen - person"]
    assert len(two.pictures("First sampling and loops")) == 7
    object_info = server.object_info()
    graph = live.lowered("9 Lab - EZIGen - person", object_info)
    for node in graph["nodes"]:
        node["mode"] = 4 if node.get("title") == "Look at both" else node["mode"]
    one = Result(server, graph, server.run(what_shows("Result", graph, object_info)), "")
    assert distance(one.pictures("Result")[0], two.pictures("Result")[0]) > 1e-3


def test_the_loops_begin_with_the_other_models_picture(results):
    result = results["9 Lab - EZIGen - any picture"]
    scene, loops = result.pictures("Scene of the other model")[0], result.pictures("First sampling and loops")
    assert np.array_equal(scene, loops[0]) and len(loops) == 7
    check_images(loops)
    assert "0 steps and 6 times 3" in result.text("Report")


def test_an_edit_changes_the_place_and_leaves_the_rest(results):
    result = results["9 Lab - EZIGen - edit"]
    loops, edited = result.pictures("Picture and loops"), result.pictures("Edited picture")[0]
    source, mask = drawn(workflows.edited(), workflows.STYLE_BACKGROUND, workflows.EDITED_SEED)
    assert distance(loops[0], source) < 1 / 254 and np.array_equal(loops[-1], edited)
    outside = ~grown(mask, 2 * CELL)
    assert outside.mean() > 0.05
    assert psnr(edited[outside], source[outside]) > 27
    assert distance(edited[mask], source[mask]) > 0.05
    assert distance(edited[mask], source[mask]) > 3 * distance(edited[outside], source[outside])
    inside = edited[mask].mean(0)  # the other one was green, the new one is red, white and yellow
    assert inside[0] > inside[1] and source[mask].mean(0)[0] < source[mask].mean(0)[1]


def test_a_drawn_picture_is_edited_until_two_loops_are_alike(results):
    """The vision model ends the loops: where the report says that the last two were alike enough, or at the most."""
    result = results["9 Lab - EZIGen - edit a drawn picture"]
    drawn_picture, edited = result.pictures("Drawn picture")[0], result.pictures("Edited picture")[0]
    loops = result.pictures("Picture and loops")
    assert distance(loops[0], drawn_picture) <= 1 / 255 and np.array_equal(loops[-1], edited)
    check_images([drawn_picture, edited])
    alike = [float(line.split()[2]) for line in result.text("Report").splitlines() if line.startswith("loop")]
    assert len(alike) == len(loops) - 1 >= 1
    assert all(value < 0.9 for value in alike[:-1]) and (alike[-1] >= 0.9 or len(alike) == 3)


def grown(mask: np.ndarray, pixels_wide: int) -> np.ndarray:
    """The mask with all that is as near to it, in squares."""
    rows, columns = np.nonzero(mask)
    result = np.zeros_like(mask)
    for row, column in zip(rows, columns, strict=True):
        top, left = max(0, row - pixels_wide), max(0, column - pixels_wide)
        result[top : row + pixels_wide + 1, left : column + pixels_wide + 1] = True
    return result


def test_three_methods_work_together(results):
    result = results["9 Lab - EZIGen - with HiPer and SINE"]
    pictures = [result.pictures(title)[0] for title in ("Prompt alone", "With the rows", "Guided too", "All three")]
    check_images(pictures, apart=5e-4)
    table = result.text("Score").splitlines()
    assert len([line for line in table if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]) == 4
    trained = {entry["node"]: entry["step"] for entry in result.run.of_type("likeness.progress")}
    titles = ("Learn the subject", "Learn the picture")
    assert trained == {workflows.node_id(result.graph, title): live.STEPS for title in titles}


def test_the_adapter_is_kept_alone(server, results):
    name = results["9 Lab - EZIGen - generate"].text("Save the adapter").splitlines()[0]
    file = server.base / "models" / "likeness_adapters" / name
    with safe_open(file, "pt") as opened:
        keys = list(opened.keys())
    assert "learnable_weights" in keys
    assert all(".adapter" in key for key in keys if key != "learnable_weights")
    before, object_info = len(server.log()), server.object_info()
    graph = live.lowered("9 Lab - EZIGen - generate", object_info, {("LikenessLoadAdapter", "name"): name})
    again = Result(server, graph, server.run(what_shows("Result", graph, object_info)), server.log()[before:])
    assert not [word for word in UNWANTED if word in again.log]
    assert distance(again.pictures("Result")[0], results["9 Lab - EZIGen - generate"].pictures("Result")[0]) < 0.01


@pytest.fixture(scope="module")
def rounded(server, results) -> np.ndarray:
    """The image to change after one way through the autoencoder."""
    prompt = {
        "load": {"class_type": "LoadImage", "inputs": {"image": workflows.EDITED_PICTURE}},
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": workflows.CHECKPOINT}},
        "in": {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["model", 2]}},
        "out": {"class_type": "VAEDecode", "inputs": {"samples": ["in", 0], "vae": ["model", 2]}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["out", 0]}},
    }
    return pixels(server.images(server.run(prompt), "show")[0])


def test_the_background_of_an_edit_is_as_good_as_the_autoencoder(results, rounded):
    source, mask = drawn(workflows.edited(), workflows.STYLE_BACKGROUND, workflows.EDITED_SEED)
    outside = ~grown(mask, 2 * CELL)
    edited = results["9 Lab - EZIGen - edit"].pictures("Edited picture")[0]
    assert psnr(edited[outside], source[outside]) > psnr(rounded[outside], source[outside]) - 0.5
