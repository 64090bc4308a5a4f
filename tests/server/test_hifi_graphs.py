"""The shipped graphs of inversion and of HiFi Tuner in the small world: what each of them shows, by numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from likeness.toyworld import workflows

from .. import live
from .results import check_images, distance, pixels

BARELY = 2e-4  # mean distance of images that differ by ten steps of training


@pytest.fixture
def source(server) -> np.ndarray:
    return pixels(Image.open(server.base / "input" / workflows.PICTURE))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(one - other).mean()))


def test_ways_back(results, source):
    """Plain guidance drifts away; direct inversion gives back what the autoencoder does, null-text comes near it."""
    result = results["9 Lab - Inversion - invert and reconstruct"]
    plain, null_text, prompt, direct = (
        psnr(result.pictures(f"Back: {way}")[0], source) for way in ("plain", "null-text", "negative prompt", "direct")
    )
    ceiling = psnr(result.pictures("Autoencoder alone")[0], source)
    assert ceiling - 0.3 < direct < ceiling + 0.3
    assert plain + 2 < null_text < direct + 0.3 and plain < prompt
    rows = [line.split() for line in result.text("Score").splitlines() if line.strip()[:1].isdigit()]
    assert [float(row[1]) for row in rows] == pytest.approx([plain, null_text, prompt, direct, ceiling], abs=0.1)
    assert "updates in all" in result.text("Report of null-text")


def test_a_swapped_word(results, source):
    """With the local blend the border of the image stays nearer to what it was; five steps show little of it."""
    result = results["9 Lab - Inversion - invert and edit"]
    again, edited = result.pictures("Picture and edit")
    plain = result.pictures("Edit without control")[0]
    check_images([again, edited, plain], apart=0.005)
    assert distance(again, source) < 0.06
    edge = np.ones(again.shape[:2], dtype=bool)
    edge[8:-8, 8:-8] = False
    assert distance(edited[edge], again[edge]) < 0.95 * distance(plain[edge], again[edge])


def test_train_subject(results, source):
    result = results["9 Lab - HiFi Tuner - train subject"]
    titles = ("Prompt alone", "One embedding", "Step-wise embedding")
    check_images([source, *(result.pictures(title)[0] for title in titles)], apart=BARELY)
    assert f"others at each of {live.EXACT_STEPS} denoising steps" in result.text("Save the subject")
    assert result.pictures("Maps")[0].std() > 0.05
    steps = [event["steps"] for event in result.run.of_type("likeness.progress")]
    assert live.STEPS in steps and 2 * live.EXACT_STEPS in steps


def test_reference_guided(results):
    result = results["9 Lab - HiFi Tuner - reference guided"]
    unguided, guided, again = (
        result.pictures(title)[0] for title in ("Unguided", "Guided by the reference", "The same again")
    )
    check_images([unguided, guided], apart=0.005)
    assert np.abs(guided - again).max() <= 1 / 255, "stock nodes must sample the same image"
    choice = result.text("Which and how").splitlines()
    assert len(choice) == 3 and sum(line.endswith("(taken)") for line in choice) == 1
    overlay = result.pictures("Laid over")[0]
    green = (overlay[..., 1] > overlay[..., 0] + 0.1) & (overlay[..., 1] > overlay[..., 2] + 0.1)
    assert green.mean() > 0.02
    assert f"of {live.EXACT_STEPS}" in result.text("Report")


def test_replace_subject(results, server):
    result = results["9 Lab - HiFi Tuner - replace subject"]
    again, swapped = result.pictures("Picture and word swap")
    once_more, replaced = result.pictures("Picture and replaced subject")
    picture = pixels(Image.open(server.base / "input" / workflows.STYLE_PICTURE))
    assert np.abs(again - once_more).max() <= 1 / 255 and distance(again, picture) < 0.08
    check_images([again, swapped, replaced], apart=BARELY)


def test_ablation(results):
    result = results["9 Lab - HiFi Tuner - ablation"]
    titles = ("Base", "+ mask", "+ regularisation", "+ step-wise", "+ reference")
    check_images([result.pictures(title)[0] for title in titles], apart=2e-5)
    rows = [line for line in result.text("Score").splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == len(titles)
    learned = {
        event["node"]
        for event in result.run.of_type("likeness.progress")
        if event["steps"] == live.STEPS and event["resumed"] == 0
    }
    assert learned == {
        workflows.node_id(result.graph, title) for title in ("Learn everything", "Learn inside the mask")
    }


def test_a_caption_describes_the_picture_to_change(results):
    """The toyworld's judge plays the captioning model."""
    assert results["9 Lab - HiFi Tuner - replace subject"].text("Its description") == "a photo of a cup at night"


def test_dreambooth_takes_on_the_details_of_a_photo(results):
    """All weights learn from two photos and their masks; the reference is one of the two, and it is described."""
    result = results["9 Lab - HiFi Tuner - DreamBooth"]
    titles = ("Model alone", "DreamBooth", "DreamBooth with the reference")
    alone, learned, guided = (result.pictures(title)[0] for title in titles)
    check_images([alone, learned, guided])
    assert result.text("Its description") in {f"a photo of a dog on the {place}" for place in ("grass", "sand")}
    assert 0 < float(result.text("How well it covers")) <= 1
    assert f"of {live.EXACT_STEPS}" in result.text("Report")
