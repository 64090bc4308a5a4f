"""The two prompts of a word swap: the words, their tokens, and both as one CONDITIONING."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...embedding.artifact import Embedding
from ...fit.runs import digest
from ...prompt.conditioning import CHUNK, Conditioning, apply_embedding, single_prompt
from ...session.describe import describe

KEY = "likeness.replace"
ROOM = CHUNK - 2  # tokens of a prompt between begin and end
CLOSE = 1e-3  # how far the rows of one text may be apart, encoded twice


@dataclass(frozen=True)
class Learned:
    """A trained subject for the edit. step: a saved one, 0 for the recommended."""

    embedding: Embedding
    scale: float = 1.0
    step: int = 0

    @property
    def tokens(self) -> int:
        """How many rows of the prompt it takes."""
        return self.embedding.tokens if self.scale else 0

    def applied(self, conditioning: Conditioning) -> Conditioning:
        """The prompt with the subject in it; one entry for each denoising step when it is step-wise."""
        rows = self.embedding.at(self.step)
        return apply_embedding(conditioning, rows, self.scale, self.embedding.windows)


def edited_prompt(prompt: str, word: str, new: str) -> str:
    """The prompt with one word (or several in a row) exchanged; ValueError unless it is there exactly once."""
    if not word.strip() or not new.strip():
        raise ValueError(
            f"The word is '{word}' and its replacement '{new}': write one or more words of the prompt, and what takes "
            "their place."
        )
    pattern = re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)
    found = len(pattern.findall(prompt))
    if found == 0:
        raise ValueError(
            f"The word '{word}' is not in the prompt '{shortened(prompt)}': write it as it stands there ('cats' is "
            "another word), or put it into the prompt that the image is inverted with."
        )
    if found > 1:
        raise ValueError(
            f"The word '{word}' is {found} times in the prompt '{shortened(prompt)}': describe the image so that "
            "it is there once, or name more of the words around it."
        )
    return pattern.sub(lambda _match: new.strip(), prompt)


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def tokens_of(clip: Any, text: str) -> list[str | int]:
    """A text's tokens without begin, end and padding; learned ones (textual inversion) as their digest."""
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    found = [token for chunk in chunks for token, _, word in chunk if word != 0]
    if len(chunks) > 1:
        raise ValueError(
            f"The prompt '{shortened(text)}' has {len(found)} tokens, {ROOM} fit into one table of rows: shorten it by "
            f"{max(1, len(found) - ROOM)}."
        )
    return [token if isinstance(token, int) else digest(describe(token)) for token in found]


def encoded(
    clip: Any, prompts: tuple[str, str], source: Conditioning | None = None
) -> tuple[Conditioning, Conditioning]:
    """Both prompts by the text encoder. source: the first one as it came; all that was put on it goes to both.

    ValueError when it is another text.
    """
    first, second = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts)
    if source is None:
        return first, second
    rows = single_prompt(source, "prompt that the image was inverted with")
    ours = first[0][0]
    if rows.shape != ours.shape or float((rows.to(ours) - ours).abs().max()) > CLOSE * float(ours.abs().max()):
        raise ValueError(
            f"The positive prompt is not '{shortened(prompts[0])}' as this CLIP encodes it: write the very text that "
            "the image was inverted with into 'prompt', and connect the same CLIP; patches of the rows (embeddings, "
            "Conditioning Concat) do not belong here."
        )
    more = {name: value for name, value in source[0][1].items() if name != "pooled_output"}
    return [[table, {**options, **more}] for table, options in first], [
        [table, {**options, **more}] for table, options in second
    ]


def paired(source: Conditioning, edit: Conditioning, learned: Learned | None, prompts: tuple[str, str]) -> Conditioning:
    """Both prompts as one CONDITIONING whose tables are [2, N, d]: the source's rows, then the edit's."""
    found: Conditioning = []
    for (rows, options), entry in zip(source, edit, strict=True):
        for edited, more in learned.applied([entry]) if learned else [entry]:
            joined = {**more, KEY: prompts}
            if isinstance(options.get("pooled_output"), Tensor):
                joined["pooled_output"] = torch.cat([options["pooled_output"], more["pooled_output"]])
            found.append([torch.cat([rows, edited.to(rows)]), joined])
    return found
