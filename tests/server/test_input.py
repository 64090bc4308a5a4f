"""A sample of the bad input of tests/input over HTTP: the page gets the same sentences from a real server."""

from __future__ import annotations

import re

import pytest

from likeness.toolbox.server import PromptError

SAMPLE = {
    "ComfyUI's own check": ({"steps": 0}, "smaller than min"),
    "a number that is none": ({"learning_rate": float("nan")}, "learning_rate"),
    "a node's check": ({"tokens": 75}, r"leaves only \d+ unused: shorten"),
    "an input that is missing": ({"vae": None}, "without a VAE: connect"),
}


def refused(server, prompt) -> str:
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    return caught.value.sentences()


@pytest.mark.parametrize("case", SAMPLE)
def test_training_input(server, training, case):
    inputs, expected = SAMPLE[case]
    prompt = training.prompt(**inputs)
    given = prompt[training.node]["inputs"]
    prompt[training.node]["inputs"] = {name: value for name, value in given.items() if value is not None}
    assert re.search(expected, refused(server, prompt))


def test_a_file_name_that_leaves_the_folder(server, training):
    prompt = training.prompt(steps=1)
    prompt[training.saver]["inputs"]["filename_prefix"] = "../../escaped"
    assert "is not a plain name" in refused(server, prompt)
    assert not list(server.base.rglob("*escaped*"))


def test_a_broken_file(server):
    folder = server.base / "models" / "likeness_embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "garbage.safetensors"
    path.write_bytes(b"not a safetensors file at all")
    load = {"class_type": "LikenessLoadEmbedding", "inputs": {"name": path.name}}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["load", 1]}}
    try:
        assert "garbage.safetensors is cut off or not" in refused(server, {"load": load, "show": show})
    finally:
        path.unlink()
