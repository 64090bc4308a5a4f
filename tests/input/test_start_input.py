"""What the user of a start graph gets for a mistake: one sentence, and nothing long has run before it."""

from __future__ import annotations

import re

import pytest

from likeness.toolbox.graph import convert
from likeness.toolbox.server import PromptError

from .. import live

SWAPS = [name for name in live.NAMES if name[:7] in ("4 Start", "5 Start")]
LONG = ("LikenessTrain", "LikenessRefine", "LikenessFineTune", "LikenessInvert", "LikenessNullText", "KSampler")


def failed(server, prompt) -> tuple[str, list[str]]:
    """What the user reads, and the types of the long nodes that ran before."""
    with pytest.raises(PromptError) as caught:
        server.run(prompt)
    ran = [prompt[name]["class_type"] for name in caught.value.data.get("executed", ())]
    return caught.value.sentences(), [each for each in ran if each.startswith(LONG)]


@pytest.mark.parametrize("name", SWAPS)
def test_a_word_that_is_not_in_the_text(server, object_info, name):
    prompt = live.anew(convert(live.lowered(name, object_info), object_info))
    swap = next(node for node in prompt.values() if node["class_type"] == "LikenessReplaceSubject")
    swap["inputs"]["word"] = "elephant"
    sentence, before = failed(server, prompt)
    assert re.search(r"'elephant' is not in the prompt '.+': write it as it stands there", sentence)
    assert not before
