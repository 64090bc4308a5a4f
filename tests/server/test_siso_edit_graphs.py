"""The shipped graphs of SISO's editing in the small world: the image comes back, and what is not masked stays."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from likeness.toolbox.graph import convert
from likeness.toyworld import workflows

from .. import live
from .results import UNWANTED, distance, pixels

NAMES = ("9 Lab - SISO - edit SDXL-turbo", "9 Lab - SISO - edit SD-turbo")


@pytest.fixture(scope="module", params=NAMES)
def result(results, request):
    return results[request.param]


@pytest.fixture
def source(server) -> np.ndarray:
    return pixels(Image.open(server.base / "input" / workflows.EDITED_PICTURE))


def test_the_picture_comes_back_by_stock_nodes(result, source):
    assert not [word for word in UNWANTED if word in result.log]
    assert distance(result.pictures("Picture again")[0], source) < 0.06
    assert "the image's latent is missed by" in result.text("How near it comes")


def test_the_edit_becomes_more_alike(result):
    pictures, best = result.pictures("All iterations"), result.pictures("Edited picture")
    assert 1 < len(pictures) <= live.STEPS and len(best) == 1
    losses = result.run.of_type("likeness.progress")[-1]["losses"]
    assert len(losses) == len(pictures) and min(losses) < losses[0]
    assert f"of {len(losses)}" in result.text("Report")
    assert min(distance(best[0], picture) for picture in pictures) < 1 / 254
    assert distance(best[0], pictures[0]) > 1e-3


def test_the_background_changes_less_than_the_subject(result, server):
    first, last = (result.pictures("All iterations")[index] for index in (0, -1))
    picture, coverage = drawn()
    assert np.array_equal(picture, np.asarray(Image.open(server.base / "input" / workflows.EDITED_PICTURE)))
    inside = coverage > 127
    assert distance(first[~inside], last[~inside]) < 0.7 * distance(first[inside], last[inside])


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """The image to change, and where its subject is."""
    from likeness.toyworld import world

    return world.render(workflows.edited(), workflows.STYLE_BACKGROUND, workflows.EDITED_SEED)


@pytest.mark.parametrize("name", NAMES)
def test_as_it_is_shipped_the_painted_mask_counts(name, object_info):
    """The group that needs a detector is switched off; what was painted passes through it."""
    graph = workflows.shipped(name)
    prompt = convert(graph, object_info)
    optimise = prompt[workflows.node_id(graph, "Optimize")]["inputs"]
    assert prompt[optimise["mask"][0]]["class_type"] == "ImageToMask"
    kinds = {node["class_type"] for node in prompt.values()}
    assert not kinds & {"LikenessSubjectMask", "LikenessCaption", "LikenessLoadRetrieval", "MaskComposite"}
