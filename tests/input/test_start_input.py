"""What the user of a start graph gets for a mistake: one sentence, and nothing long has run before it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from likeness.toolbox.graph import convert, with_ancestors
from likeness.toolbox.server import PromptError
from likeness.toyworld import workflows

from .. import live, tiny_models

STARTS = {int(name[0]): name for name in live.NAMES if re.match(r"\d Start", name)}
LONG = ("LikenessTrain", "LikenessRefine", "LikenessFineTune", "LikenessInvert", "LikenessNullText", "LikenessOptimize")
TEXTS = {
    "a word that is not there": ("a photo of a cat", "elephant", "'elephant' is not in the prompt 'a photo of a cat'"),
    "no text": ("", "cat", "'cat' is not in the prompt ''"),
    "a text for two tables": ("a cat" + 90 * " word", "cat", r"has 92 tokens, 75 fit .*: shorten it by 17\."),
}
FILES = {3: "LikenessLoadAdapter", 6: "LikenessLoadVision", 7: "LikenessLoadVision", 8: "LikenessLoadEmbedding"}


class TinySDXL:
    """In the place of Load Checkpoint."""

    RETURN_TYPES, FUNCTION = ("MODEL", "CLIP", "VAE"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  (ComfyUI's name)
        return {"required": {"ckpt_name": ("STRING", {})}}

    def load(self, ckpt_name: str) -> tuple[Any, ...]:  # noqa: ARG002
        return tiny_models.sdxl(), tiny_models.clip_xl(), tiny_models.taesd()


def start(number: int, object_info, settings=None) -> dict[str, Any]:
    return live.anew(convert(live.lowered(STARTS[number], object_info, settings=settings), object_info))


def of_type(prompt: dict[str, Any], kind: str) -> Iterable[dict[str, Any]]:
    return (node for node in prompt.values() if node["class_type"] == kind)


def failed(server, prompt) -> tuple[str, list[str]]:
    """What the user reads, and the types of the long nodes that ran before."""
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    ran = [prompt[name]["class_type"] for name in caught.value.data.get("executed", ())]
    return caught.value.sentences(), [each for each in ran if each.startswith(LONG)]


@pytest.mark.parametrize("number", [4, 5])
@pytest.mark.parametrize("case", TEXTS)
def test_a_word_that_cannot_be_swapped(server, object_info, number, case):
    text, word, expected = TEXTS[case]
    prompt = start(number, object_info)
    for swap in of_type(prompt, "LikenessReplaceSubject"):
        swap["inputs"].update({"prompt": text, "word": word})
    sentence, before = failed(server, prompt)
    assert re.search(expected, sentence) and not before


@pytest.mark.parametrize("number", [1, 7])
def test_no_text_for_the_new_picture(server, object_info, number):
    prompt = start(number, object_info, {("New picture", "value"): ""})
    node = next(name for name, node in prompt.items() if node["class_type"] == "LikenessTrainEmbedding")
    prompt[node]["inputs"]["steps"] = 1
    prompt["show"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 1]}}
    seen = len(server.log())
    server.run(with_ancestors(prompt, ["show"]))
    assert "The prompt on 'target' is empty: write what you want to see" in server.log()[seen:]


@pytest.mark.parametrize("number", FILES)
def test_a_missing_file(server, object_info, number):
    prompt = start(number, object_info)
    for loader in of_type(prompt, FILES[number]):
        loader["inputs"]["name"] = "dinov2-large"
    sentence, before = failed(server, prompt)
    assert re.search(r"There is no 'dinov2-large' in .*ownload .*https://.* press R", sentence) and not before


def test_a_photo_in_which_no_subject_is_marked(server, object_info):
    """The photo of the toyworld has no white background."""
    photo = {("Your photo", "image"): workflows.PICTURE}
    sentence, _ = failed(server, start(3, object_info, photo))
    assert sentence.startswith("The mask is empty, and the subject's image has no white background: paint the subject")


def test_a_checkpoint_that_the_adapter_does_not_fit(server, object_info, monkeypatch):
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TinySDXL", TinySDXL)
    prompt = start(3, object_info)
    for loader in of_type(prompt, workflows.NARROW_LOADER):
        loader["class_type"] = "TinySDXL"
    for loader in of_type(prompt, "LikenessLoadAdapter"):
        loader["inputs"]["name"] = workflows.ADAPTER
    sentence, _ = failed(server, prompt)
    assert re.search("UNet takes 36: too many: up_.*Connect the model that the adapter was trained for", sentence)
