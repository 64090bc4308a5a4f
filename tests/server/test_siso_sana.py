"""The shipped graph of SISO on Sana, on a tiny random folder of it: what runs, and what goes wrong with a sentence."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from likeness.toolbox.graph import convert
from likeness.toolbox.server import PromptError
from likeness.toyworld import workflows

from .. import live, tiny_sana
from .results import UNWANTED, distance


@pytest.fixture(scope="module")
def settings(server):
    return tiny_sana.in_server(server)


@pytest.fixture(scope="module")
def ran(results):
    return results["9 Lab - SISO - Sana"]


def test_the_lora_changes_the_pictures_of_another_prompt(ran):
    without, learned = (ran.pictures(f"{which} the LoRA")[0] for which in ("Without", "With"))
    assert without.shape == learned.shape == (workflows.SIZE, workflows.SIZE, 3)
    assert without.std() > 0.01 and distance(without, learned) > 1e-4


def test_the_log_is_clean(ran):
    assert not [line for line in ran.log.splitlines() if any(word in line for word in UNWANTED)]


def test_every_iterations_picture_is_shown_and_the_best_told(ran):
    pictures, best = ran.pictures("All iterations"), ran.pictures("Most alike")
    assert len(pictures) == tiny_sana.ITERATIONS and len(best) == 1
    assert min(distance(best[0], picture) for picture in pictures) < 1 / 254
    assert f"of {tiny_sana.ITERATIONS}" in ran.text("Report")
    steps = [event["step"] for event in ran.run.of_type("likeness.progress")]
    assert steps[-1] == tiny_sana.ITERATIONS


def test_the_saved_lora_gives_the_same_picture_in_the_stock_loader(server, settings, ran):
    """In place of the optimisation's own output."""
    name = ran.text("Save the LoRA").splitlines()[0]
    object_info = server.object_info()
    graph = live.lowered("9 Lab - SISO - Sana", object_info, settings=settings)
    prompt = convert(graph, object_info)
    learner, sana = (workflows.node_id(graph, title) for title in ("Optimize", "Sana"))
    prompt["900"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": [sana, 0], "lora_name": name, "strength_model": 1.0},
    }
    guider, shown = (workflows.node_id(graph, title) for title in ("Guider with", "With the LoRA"))
    assert prompt[guider]["inputs"]["model"] == [learner, 0]
    prompt[guider]["inputs"]["model"] = ["900", 0]
    before = len(server.log())
    run = server.run({key: node for key, node in prompt.items() if key in needed(prompt, shown)})
    assert "not loaded" not in server.log()[before:]
    found = np.asarray(server.images(run, shown)[0].convert("RGB"), dtype=np.float32) / 255
    assert np.abs(found - ran.pictures("With the LoRA")[0]).max() <= 1 / 255


def needed(prompt: dict, node: str) -> set[str]:
    """A node and what it comes from."""
    sources = [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(needed(prompt, source) for source in sources))


def test_gradients_in_the_server(server, settings, ran):
    """After stock samplers have run the model; with and without checkpointing."""
    object_info = server.object_info()
    graph = live.lowered("9 Lab - SISO - Sana", object_info, settings=settings)
    prompt = convert(graph, object_info)
    sana = workflows.node_id(graph, "Sana")
    learner = prompt[workflows.node_id(graph, "Optimize")]["inputs"]
    asked = {"model": [sana, 0], "vae": [sana, 2], "positive": learner["positive"], "latent": learner["latent"]}
    prompt["900"] = {"class_type": "ToyworldCheckGradients", "inputs": asked}
    prompt["901"] = {"class_type": "PreviewAny", "inputs": {"source": ["900", 0]}}
    run = server.run({key: node for key, node in prompt.items() if key in needed(prompt, "901")})
    lines = [line.split() for line in "\n".join(run.outputs["901"]["text"]).splitlines()]
    assert len(lines) == 6
    assert all(abs(float(slope)) > 1e-3 and float(error) < 0.01 for *_, slope, error in lines), lines


def refused(server, settings) -> str:
    object_info = server.object_info()
    graph = live.lowered("9 Lab - SISO - Sana", object_info, settings=settings)
    with pytest.raises(PromptError) as caught:
        server.run(convert(graph, object_info))
    return caught.value.sentences()


def test_a_folder_with_pickles_is_refused(server, settings):
    folder = server.base / "models" / "diffusers" / "pickled"
    shutil.copytree(folder.with_name(tiny_sana.NAME), folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    try:
        said = refused(server, {**settings, ("LikenessLoadSana", "name"): "pickled"})
    finally:
        shutil.rmtree(folder)
    assert "a pickle, which can run code" in said


def test_hostile_names_are_refused(server, settings):
    for name in ("../checkpoints", "/etc", "tiny_sana/../../loras"):
        said = refused(server, {**settings, ("LikenessLoadSana", "name"): name})
        assert "not in list" in said or "not a plain name" in said


def test_a_text_encoder_is_not_trained(server, settings):
    object_info = server.object_info()
    graph = live.lowered("9 Lab - SISO - Sana", object_info, settings=settings)
    prompt = convert(graph, object_info)
    learner, sana = (workflows.node_id(graph, title) for title in ("Optimize", "Sana"))
    prompt[learner]["inputs"] |= {"clip": [sana, 1], "prompt": "a photo of a dog"}
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    assert "disconnect 'clip'" in caught.value.sentences()
