"""The shipped graphs of SISO's generation in the small world, and on tiny random transformers: what they show, by
numbers.
"""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toolbox.server import PromptError
from likeness.toyworld import workflows

from .. import live
from ..vision.test_retrieval import published
from .results import UNWANTED, check_images, distance

RETRIEVAL = ("Retrieval model", "Like it in retrieval too")
NAMES = tuple(
    f"9 Lab - SISO - {name}"
    for name in ("generate", "SDXL-turbo", "references", "FLUX.1-schnell", "FLUX.2 Klein", "Z-Image-Turbo")
)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_becomes_more_alike_and_the_lora_works_in_another_prompt(results, name):
    result = results[name]
    assert not [word for word in UNWANTED if word in result.log]
    pictures, best = result.pictures("All iterations"), result.pictures("Most alike")
    assert 1 < len(pictures) <= live.ITERATIONS and len(best) == 1
    assert min(distance(best[0], picture) for picture in pictures) < 1 / 254
    losses = result.run.of_type("likeness.progress")[-1]["losses"]
    assert len(losses) == len(pictures) and min(losses) < losses[0]
    assert f"of {len(losses)}" in result.text("Report")
    without, learned = (result.pictures(f"{which} the LoRA")[0] for which in ("Without", "With"))
    assert without.shape == learned.shape == (workflows.SIZE, workflows.SIZE, 3)
    assert without.std() > 0.03 and distance(without, learned) > 1e-3


KEYS = {
    "9 Lab - SISO - generate": ("lora_unet_",),
    "9 Lab - SISO - SDXL-turbo": ("lora_unet_", "lora_te_"),
    "9 Lab - SISO - FLUX.1-schnell": ("transformer.", "text_encoder."),
    "9 Lab - SISO - FLUX.2 Klein": ("diffusion_model.",),
    "9 Lab - SISO - Z-Image-Turbo": ("diffusion_model.",),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_saved_file_holds_the_parts_that_were_learned(server, results, name):
    file = server.base / "models" / "loras" / results[name].text("Save the LoRA").splitlines()[0]
    with safe_open(file, "pt") as opened:
        keys, header = list(opened.keys()), json.loads(opened.metadata()["likeness"])
    assert header["prompt"], "what it was learned from is in the file"
    assert all(key.startswith(KEYS[name]) for key in keys)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in KEYS[name])


def test_the_stock_loader_shows_the_subject_in_three_prompts(results):
    assert "not loaded" not in results["9 Lab - SISO - reuse"].log
    check_images([results["9 Lab - SISO - reuse"].pictures(f"Result {index}")[0] for index in (1, 2, 3)])


def test_several_references_are_not_one(results):
    both = ("9 Lab - SISO - generate", "9 Lab - SISO - references")
    one, two = (results[name].pictures("Most alike")[0] for name in both)
    assert distance(one, two) > 1e-4


def with_retrieval(server) -> dict:
    """9 Lab - SISO - generate with the group of the retrieval model switched on, as the server takes it."""
    object_info = server.object_info()
    graph = live.lowered("9 Lab - SISO - generate", object_info)
    for node in graph["nodes"]:
        if node.get("title") in RETRIEVAL:
            node["mode"] = 0
    return with_ancestors(convert(graph, object_info), [workflows.node_id(graph, "Report")])


def test_without_the_retrieval_weights_it_says_where_they_are(server):
    prompt = with_retrieval(server)
    loader = next(name for name, node in prompt.items() if node["class_type"] == "LikenessLoadRetrieval")
    prompt[loader]["inputs"]["name"] = "absent.pth"
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    told = caught.value.sentences()
    assert all(word in told for word in ("models/ir_features", "kaggle.com", "licence", "DINOv2 alone"))


def test_with_the_retrieval_weights_two_likenesses_count(server):
    folder = server.base / "models" / "ir_features"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in published().items()}, folder / "tiny.safetensors")
    prompt = with_retrieval(server)
    loader = next(name for name, node in prompt.items() if node["class_type"] == "LikenessLoadRetrieval")
    prompt[loader]["inputs"]["name"] = "tiny.safetensors"
    run = server.run(prompt)
    report = next(name for name, node in prompt.items() if node["class_type"] == "PreviewAny")
    first = run.outputs[report]["text"][0].splitlines()[0]
    assert len(first.partition("(")[2].split()) == 2, "a number for each of the two"
