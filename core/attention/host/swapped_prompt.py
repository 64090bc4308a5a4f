"""The two prompts of a word swap: their text, their tokens, and both as one CONDITIONING."""

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
CLOSE = 1e-3  # relative: tolerance between two encodings of the same text


@dataclass(frozen=True)
class LearnedSubject:
    """A trained subject for the edit. step: a saved step, 0 for the recommended one."""

    embedding: Embedding
    scale: float = 1.0
    step: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens it occupies in the prompt."""
        return self.embedding.tokens if self.scale else 0

    def apply(self, conditioning: Conditioning) -> Conditioning:
        """The prompt with the subject in it; one entry per denoising step if the embedding is step-wise."""
        rows = self.embedding.at(self.step)
        return apply_embedding(conditioning, rows, self.scale, self.embedding.windows)


def edited_prompt(prompt: str, word: str, new: str) -> str:
    """The prompt with one word (or a phrase) replaced; ValueError unless it occurs exactly once."""
    if not word.strip() or not new.strip():
        raise ValueError(
            f"The word is '{word}' and its replacement '{new}': write one or more words of the prompt, and what takes "
            "their place."
        )
    pattern = rf"(?i)(?<!\w){re.escape(word.strip())}(?!\w)"
    count = len(re.findall(pattern, prompt))
    if count == 0:
        raise ValueError(
            f"The word '{word}' is not in the prompt '{shorten(prompt)}': write it as it stands there ('cats' is "
            "another word), or put it into the prompt that the image is inverted with."
        )
    if count > 1:
        raise ValueError(
            f"The word '{word}' is {count} times in the prompt '{shorten(prompt)}': describe the image so that "
            "it is there once, or name more of the words around it."
        )
    return re.sub(pattern, lambda _match: new.strip(), prompt)


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def tokens_of(clip: Any, text: str) -> list[str | int]:
    """A text's tokens without begin, end and padding; learned tokens (textual inversion) as their digest."""
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    tokens = [token for chunk in chunks for token, _, word in chunk if word != 0]
    if len(chunks) > 1:
        raise ValueError(
            f"The prompt '{shorten(text)}' has {len(tokens)} tokens, {ROOM} fit into one table of rows: shorten it by "
            f"{max(1, len(tokens) - ROOM)}."
        )
    return [token if isinstance(token, int) else digest(describe(token)) for token in tokens]


def encode_prompts(
    clip: Any, prompts: tuple[str, str], source: Conditioning | None = None
) -> tuple[Conditioning, Conditioning]:
    """Encode both prompts. source: the first prompt as connected; its options are copied to both.

    ValueError when it encodes another text.
    """
    first, second = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts)
    if source is None:
        return first, second
    rows = single_prompt(source, "prompt that the image was inverted with")
    encoded = first[0][0]
    if rows.shape != encoded.shape or float((rows.to(encoded) - encoded).abs().max()) > CLOSE * float(
        encoded.abs().max()
    ):
        raise ValueError(
            f"The positive prompt is not '{shorten(prompts[0])}' as this CLIP encodes it: write the very text that "
            "the image was inverted with into 'prompt', and connect the same CLIP; patches of the rows (embeddings, "
            "Conditioning Concat) do not belong here."
        )
    extra = {name: value for name, value in source[0][1].items() if name != "pooled_output"}
    return [[table, {**options, **extra}] for table, options in first], [
        [table, {**options, **extra}] for table, options in second
    ]


def pair_prompts(
    source: Conditioning, edit: Conditioning, learned: LearnedSubject | None, prompts: tuple[str, str]
) -> Conditioning:
    """Both prompts as one CONDITIONING with token embeddings [2, N, d]: the source's, then the edit's."""
    pairs: Conditioning = []
    for (rows, options), entry in zip(source, edit, strict=True):
        for edit_rows, edit_options in learned.apply([entry]) if learned else [entry]:
            joined = {**edit_options, KEY: prompts}
            if isinstance(options.get("pooled_output"), Tensor):
                joined["pooled_output"] = torch.cat([options["pooled_output"], edit_options["pooled_output"]])
            pairs.append([torch.cat([rows, edit_rows.to(rows)]), joined])
    return pairs
