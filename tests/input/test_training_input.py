"""What a user gets for bad input: one sentence that helps, before any work is done."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from likeness.toolbox.graph import with_ancestors
from likeness.toolbox.server import PromptError


def refused(server, prompt) -> str:
    """Run a prompt that must fail and return what the user reads."""
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    return caught.value.sentences()


def with_node(prompt: dict, node: str, class_type: str, /, **inputs) -> dict:
    return {**prompt, node: {"class_type": class_type, "inputs": inputs}}


def no_work(run_folder) -> set[str]:
    return {path.name for path in run_folder.glob("*")}


LONG_PROMPT = "dog " * 73  # of the 75 words that one table of rows holds
WIDGETS = {
    "no steps": ({"steps": 0}, "smaller than min"),
    "more tokens than the prompt leaves": ({"tokens": 75}, r"the last 75 rows.*leaves only \d+ unused: shorten"),
    "empty prompt without one": ({"init": "empty prompt", "negative": None}, "'negative': connect the empty prompt"),
    "no image": ({"image": None}, "either a LATENT, or an IMAGE"),
    "no VAE": ({"vae": None}, "without a VAE: connect"),
    "a range that is none": ({"start_percent": 0.9, "end_percent": 0.1}, "give a start below the end"),
}


@pytest.mark.parametrize("case", WIDGETS)
def test_training_input(server, training, case):
    inputs, expected = WIDGETS[case]
    prompt = training.prompt(**inputs)
    for name in [name for name, value in inputs.items() if value is None]:
        del prompt[training.node]["inputs"][name]
    before = no_work(training.runs_folder())
    assert re.search(expected, refused(server, prompt))
    assert no_work(training.runs_folder()) == before


def test_prompt_that_fills_all_rows(server, training):
    prompt = training.prompt(tokens=5)
    prompt[training.source]["inputs"]["text"] = LONG_PROMPT
    assert re.search(r"leaves only \d+ unused: shorten", refused(server, prompt))


def test_empty_mask(server, training):
    prompt = with_node(training.prompt(mask=["mask", 0]), "mask", "SolidMask", value=0.0, width=96, height=96)
    assert "mask" in refused(server, prompt).lower()


def test_masks_of_another_number(server, training):
    prompt = with_node(
        training.prompt(image=["more", 0], mask=["masks", 0]), "one", "SolidMask", value=1.0, width=96, height=96
    )
    picture = training.prompt()[training.node]["inputs"]["image"]
    prompt = with_node(prompt, "more", "RepeatImageBatch", image=picture, amount=3)
    prompt = with_node(prompt, "as_image", "MaskToImage", mask=["one", 0])
    prompt = with_node(prompt, "two", "RepeatImageBatch", image=["as_image", 0], amount=2)
    prompt = with_node(prompt, "masks", "ImageToMask", image=["two", 0], channel="red")
    assert re.search("2 masks came with 3 images", refused(server, prompt))


@pytest.mark.parametrize("prefix", ["../../escaped", "/etc/escaped", "C:\\escaped", "a/../../escaped"])
def test_hostile_file_name(server, training, prefix):
    prompt = training.prompt(steps=1)
    prompt[training.saver]["inputs"]["filename_prefix"] = prefix
    assert "is not a plain name" in refused(server, prompt)
    assert not list(server.base.rglob("*escaped*"))


def loading(name: str) -> dict:
    prompt = with_node({}, "load", "LikenessLoadEmbedding", name=name)
    return with_node(prompt, "show", "PreviewAny", source=["load", 1])


def test_name_outside_of_the_folder(server):
    answer = refused(server, loading("../checkpoints/likeness_small_world.safetensors"))
    plain = "is not a plain name below models/likeness_embeddings"
    assert plain in answer or "Value not in list" in answer  # newer ComfyUI looks at its list first


def nan_rows() -> dict[str, np.ndarray]:
    return {"rows": np.full((5, 768), np.nan, dtype=np.float32)}


def write_nan(path) -> None:
    save_file(nan_rows(), path)


def write_cut_off(path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def write_garbage(path) -> None:
    path.write_bytes(b"not a safetensors file at all")


def write_foreign(path) -> None:
    save_file({"something": np.zeros((2, 2), dtype=np.float32)}, path, metadata={"note": json.dumps({"a": 1})})


def write_oversized(path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**31)  # sparse: takes no room on the disk


@pytest.mark.parametrize("write", [write_nan, write_cut_off, write_garbage, write_foreign, write_oversized])
def test_broken_file(server, write):
    folder = server.base / "models" / "likeness_embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{write.__name__}.safetensors"
    write(path)
    try:
        answer = refused(server, loading(path.name))
    finally:
        path.unlink()
    assert path.name in answer and "Traceback" not in answer
    assert re.search(": copy or train|: it is not one of ours|: choose one made by", answer), answer


def test_embedding_of_another_width(server, training):
    """Rows of SDXL's width, applied to a prompt of the small world."""
    good = rows_of_a_file(server, training)
    folder = server.base / "models" / "likeness_embeddings"
    path = folder / "wide.safetensors"
    from safetensors import safe_open

    with safe_open(good, "np") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wide = {key: np.tile(value, 22)[..., :2048] if value.ndim > 1 else value for key, value in tensors.items()}
    save_file({key: np.ascontiguousarray(value) for key, value in wide.items()}, path, metadata=metadata)
    source = training.prompt()[training.node]["inputs"]["positive"]
    prompt = with_node(training.prompt(), "load", "LikenessLoadEmbedding", name=path.name)
    inputs = {"conditioning": source, "embedding": ["load", 0], "scale": 0.8, "step": 0}
    prompt = with_node(prompt, "apply", "LikenessApplyEmbedding", **inputs)
    prompt = with_node(prompt, "show", "PreviewAny", source=["apply", 0])
    try:
        assert re.search("width", refused(server, with_ancestors(prompt, ["show"])))
    finally:
        path.unlink()


def rows_of_a_file(server, training):
    return training.saved(training.run(seed=5000, steps=1, save_every=1))
