"""What a user of EZIGen's nodes gets for bad input: one sentence that helps, before any work is done."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from likeness.toolbox.graph import convert
from likeness.toyworld import workflows

from .. import live
from .test_training_input import refused, with_node

SAMPLER, SUBJECT, ADAPTER = "Sample in stages", "Look at the subject", "Adapter"


@pytest.fixture(scope="module")
def graph(object_info) -> dict:
    return live.lowered("9 Lab - EZIGen - generate", object_info)


def changed(server, graph, title: str, **inputs) -> dict:
    """The graph as the server takes it, with these inputs of a node; None disconnects one."""
    prompt = convert(graph, server.object_info())
    node = prompt[workflows.node_id(graph, title)]
    node["inputs"] = {name: value for name, value in {**node["inputs"], **inputs}.items() if value is not None}
    return prompt


SAMPLING = {
    "a split ratio of 0": ({"split_ratio": 0.0}, "smaller than min"),
    "a split ratio of 1": ({"split_ratio": 1.0}, "bigger than max"),
    "no step left for the layout": ({"split_ratio": 0.95}, "leaves none of 5 steps for the layout: take more steps"),
    "steps that the scheduler does not give": ({"steps": 30}, "31 steps when asked for 30: ask for a divisor of 1000"),
    "more loops at least than at most": ({"min_loops": 5}, "min_loops is 5 and max_loops 3: set min_loops no higher"),
    "nothing that says when to stop": ({"max_loops": 9, "vision": None}, "connect a CLIP_VISION, or set both"),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(server, graph, case):
    inputs, expected = SAMPLING[case]
    assert expected in refused(server, changed(server, graph, SAMPLER, **inputs))


def test_a_subject_without_white_around_it(server, graph):
    """Nothing painted, nothing found: the whole image, which is not white, would be the subject."""
    picture = workflows.node_id(graph, "Picture of the subject")
    said = refused(server, changed(server, graph, SUBJECT, image=[picture, 0]))
    assert "The mask is empty, and the subject's image has no white background: paint the subject" in said


def test_a_picture_on_white_needs_no_mask_and_another_without_one_is_warned_of(server, graph):
    picture = workflows.node_id(graph, "Picture of the subject")
    for background, expected in ((0, True), (0xFFFFFF, False)):
        prompt = changed(server, graph, SUBJECT, image=["plain", 0], mask=None)
        prompt = with_node(prompt, "plain", "EmptyImage", width=96, height=96, batch_size=1, color=background)
        prompt.pop(picture)
        shown = workflows.node_id(graph, "What is looked at")
        before = len(server.log())
        server.run({name: prompt[name] for name in needed(prompt, shown)})
        assert ("has no white background" in server.log()[before:]) == expected


def needed(prompt: dict, node: str) -> set[str]:
    links = [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node}.union(*(needed(prompt, link) for link in links))


def test_a_model_that_predicts_v(server, graph):
    model = workflows.node_id(graph, "Model")
    for title in (SUBJECT, SAMPLER):
        prompt = changed(server, graph, title, model=["v", 0])
        prompt = with_node(prompt, "v", "ModelSamplingDiscrete", model=[model, 0], sampling="v_prediction", zsnr=False)
        assert "V_PREDICTION (SD2.1 at 768 predicts v)" in refused(server, prompt)


def adapter_file(server, name: str, tensors: dict[str, np.ndarray]) -> str:
    folder = server.base / "models" / "likeness_adapters"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    return name


def small_worlds() -> dict[str, np.ndarray]:
    return load_file(workflows.MODELS / "likeness_adapters" / workflows.NARROW_ADAPTER)


def test_an_adapter_of_other_widths(server, graph):
    said = refused(server, changed(server, graph, ADAPTER, name=workflows.ADAPTER))
    assert "64" in said and "320" in said and ": " in said


def test_a_file_that_is_no_adapter(server, graph):
    name = adapter_file(server, "foreign.safetensors", {"something": np.zeros((2, 2), np.float32)})
    assert "foreign.safetensors holds no adapter" in refused(server, changed(server, graph, ADAPTER, name=name))


def test_half_an_adapter(server, graph):
    tensors = small_worlds()
    tensors.pop(next(key for key in tensors if key.endswith("to_k.weight")))
    name = adapter_file(server, "half.safetensors", tensors)
    assert "to_k.weight' of its adapter: copy or download it again" in refused(
        server, changed(server, graph, ADAPTER, name=name)
    )


def test_an_adapter_that_is_not_there(server, graph):
    """It says where the published one is."""
    said = refused(server, changed(server, graph, ADAPTER, name="checkpoint-200000"))
    assert re.search("There is no 'checkpoint-200000' in .*likeness_adapters: download the zip that https://", said)


def test_an_adapter_outside_of_its_folder(server, graph):
    name = "../checkpoints/likeness_small_world.safetensors"
    said = refused(server, changed(server, graph, ADAPTER, name=name))
    assert f"'{name}' is not a plain name below models/likeness_adapters: choose one from the list" in said


def test_an_edit_without_a_place(server, object_info):
    graph = live.lowered("9 Lab - EZIGen - edit", object_info)
    painted = next(node for node in graph["nodes"] if node["type"] == "ImageToMask")
    said = refused(server, changed(server, graph, "Put it there", mask=[str(painted["id"]), 0]))
    assert "The mask is empty: paint the place of the subject" in said
