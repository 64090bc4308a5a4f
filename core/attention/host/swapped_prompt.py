"""The two prompts of a word swap: their text, their tokens, and both as one CONDITIONING."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...embedding.artifact import Embedding
from ...fit.runs import digest
from ...prompt.conditioning import CHUNK, TAIL_OF_PADDING, Conditioning, apply_embedding, single_prompt
from ...session.describe import describe
from ..prompt_to_prompt import Swap, token_swap, word_swap

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
        return self.embedding.tokens if self.scale else 0

    def apply(self, conditioning: Conditioning) -> Conditioning:
        """The prompt with the subject in it; one entry per denoising step if the embedding is step-wise."""
        rows = self.embedding.at(self.step)
        return apply_embedding(conditioning, rows, self.scale, self.embedding.windows)


def edited_prompt(prompt: str, word: str, new: str) -> str:
    """The prompt with one word (or a phrase) replaced; ValueError unless it occurs exactly once."""
    if not word.strip() or not new.strip():
        raise ValueError(
            f"The word is '{shorten(word)}' and its replacement '{shorten(new)}': write one or more words of the "
            "prompt, and what takes their place."
        )
    pattern = rf"(?i)(?<!\w){re.escape(word.strip())}(?!\w)"
    count = len(re.findall(pattern, prompt))
    if count == 0:
        raise ValueError(
            f"The word '{shorten(word)}' is not in the prompt '{shorten(prompt)}': write it as it stands there ('cats' "
            "is another word), or put it into the prompt that the image is inverted with."
        )
    if count > 1:
        raise ValueError(
            f"The word '{shorten(word)}' is {count} times in the prompt '{shorten(prompt)}': describe the image so "
            "that it is there once, or name more of the words around it."
        )
    return re.sub(pattern, lambda _match: new.strip(), prompt)


def check_texts(clip: Any, prompt: str, word: str, new: str) -> None:
    """ValueError for texts that no model can swap: what can be told before the image is inverted."""
    for text in (prompt, edited_prompt(prompt, word, new)):
        if clip is not None and all(len(chunks) > 1 for chunks in clip.tokenize(text).values()):
            tokens_of(clip, text)


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def tokens_of(clip: Any, text: str) -> list[str | int]:
    """A text's tokens without begin, end and padding; learned tokens (textual inversion) as their digest."""
    chunks = next(iter(clip.tokenize(text, return_word_ids=True).values()))
    tokens = [_comparable(token) for chunk in chunks for token, _, word in chunk if word != 0]
    _check_one_table(chunks, tokens, text)
    return tokens


def _check_one_table(chunks: list[Any], tokens: list[Any], text: str) -> None:
    if len(chunks) > 1:
        raise ValueError(
            f"The prompt '{shorten(text)}' has {len(tokens)} tokens, {ROOM} fit into one table of rows: shorten it by "
            f"{max(1, len(tokens) - ROOM)}."
        )


def _comparable(token: Any) -> str | int:
    return token if isinstance(token, int) else digest(describe(token))


def clip_swap(clip: Any, prompt: str, edited: str, word: str, learned: LearnedSubject | None) -> Swap:
    """The swap in the tokens of a CLIP text encoder; ValueError when the learned subject does not fit behind them."""
    of_source, of_edit, of_word = (tokens_of(clip, text) for text in (prompt, edited, word.strip()))
    try:
        swap = word_swap(of_source, of_edit, of_word)
    except ValueError as error:
        raise ValueError(
            f"'{shorten(word)}' is no token sequence of its own in '{shorten(prompt)}' ({error}): put spaces around "
            "it, and give weights such as (word:1.2) to the whole word."
        ) from error
    _check_tail(learned, ROOM - len(of_edit), edited)
    return swap


def _check_tail(learned: LearnedSubject | None, room: int, edited: str) -> None:
    tail = learned.tokens if learned else 0
    if tail > max(room, 0):
        raise ValueError(
            f"The embedding takes the last {tail} rows of the prompt, but '{shorten(edited)}' leaves only "
            f"{room} unused: shorten the prompt by {tail - room} tokens."
        )


def encoder_swaps(
    clip: Any, prompts: tuple[str, str], source: Conditioning, edit: Conditioning, learned: LearnedSubject | None
) -> tuple[Swap, ...]:
    """The swap in the tokens of each text encoder whose tokens the prompt holds, from its two encodings.

    Which encoders these are, and where their tokens begin, is asked of them: one at a time gets the edit.
    """
    tokenized, plain = [clip.tokenize(text, return_word_ids=True) for text in prompts], [*map(clip.tokenize, prompts)]
    rows, swaps, room = source[0][0], [], 0
    for name in plain[0]:
        both = [[token for chunk in each[name] for token in chunk] for each in tokenized]
        words = [[_comparable(token) for token, _, word in each if word] for each in both]
        swap = token_swap(*words)
        if swap is None:
            continue
        other = edit[0][0]
        if len(plain[0]) > 1:
            other = clip.encode_from_tokens_scheduled({**plain[0], name: plain[1][name]})[0][0]
        if other.shape != rows.shape:
            raise ValueError(
                f"The prompts have {len(words[0])} and {len(words[1])} tokens, and this text encoder does not pad them "
                f"to one length: choose a replacement of {swap.old} tokens, not {swap.new}, or put more words of the "
                "prompt into 'word' and 'replacement' until they are equally long."
            )
        changed = (other.float() - rows.float()).abs().amax((0, 2)).nonzero()[:, 0].tolist()
        if changed:  # others give a pooled vector only
            for text, each, own in zip(prompts, tokenized, words, strict=True):
                _check_one_table(each[name], own, text)
            lead = next(index for index, (_, _, word) in enumerate(both[0]) if word)
            first, end = _rows_of(changed, len(both[0]), lead + max(map(len, words)), lead + swap.start)
            swaps.append(Swap(first + lead + swap.start, swap.old, swap.new, end))
            room = len(both[1]) - lead - len(words[1]) - 1
    if learned is not None and learned.embedding.placement != TAIL_OF_PADDING:
        raise ValueError(
            "The embedding is appended to prompts of this text encoder, so that the edit would have more tokens than "
            "the image's own prompt: leave it out, and let the replacement describe the subject."
        )
    _check_tail(learned, room, prompts[1])
    return tuple(dict.fromkeys(swaps))


def _rows_of(changed: list[int], count: int, words_end: int, start: int) -> tuple[int, int]:
    """The first token embedding of a text encoder with `count` tokens, below 0 if a template is cut off, and the one
    behind its last, from those that change with its token `start`: all of them, or, of an encoder that only looks back,
    those from there on; padding that it masks does not change.
    """
    for length in (count, words_end, words_end + 1):
        for skipped in (start, 0):
            if changed[-1] - changed[0] + 1 == length - skipped:
                return changed[0] - skipped, changed[0] - skipped + count
    raise ValueError(
        "Which of this text encoder's tokens belong to the word cannot be told: use one of SD1.x to SDXL, FLUX, "
        "Qwen-Image or another that gives an embedding for each token."
    )


def encode_prompts(
    clip: Any, prompts: tuple[str, str], source: Conditioning | None = None
) -> tuple[Conditioning, Conditioning]:
    """Both prompts, encoded. source: the first as connected, whose options both get; ValueError for another text."""
    first, second = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts)
    if source is None:
        return first, second
    rows = single_prompt(source, "prompt that the image was inverted with")
    encoded = first[0][0]
    limit = CLOSE * float(encoded.abs().max())
    if rows.shape != encoded.shape or float((rows.to(encoded) - encoded).abs().max()) > limit:
        raise ValueError(
            f"The positive prompt is not '{shorten(prompts[0])}' as this CLIP encodes it: write the very text that "
            "the image was inverted with into 'prompt', and connect the same CLIP; patches of the rows (embeddings, "
            "Conditioning Concat) do not belong here."
        )
    extra = {name: value for name, value in source[0][1].items() if name != "pooled_output"}
    first, second = ([[table, {**options, **extra}] for table, options in each] for each in (first, second))
    return first, second


def pair_prompts(
    source: Conditioning, edit: Conditioning, learned: LearnedSubject | None, prompts: tuple[str, str]
) -> Conditioning:
    """Both prompts as one CONDITIONING with token embeddings [2, N, d]: the source's, then the edit's."""
    pairs: Conditioning = []
    for (rows, options), entry in zip(source, edit, strict=True):
        for edit_rows, edit_options in learned.apply([entry]) if learned else [entry]:
            joined = {**edit_options, KEY: prompts}
            for name, value in options.items():
                other = edit_options.get(name)
                if not isinstance(value, Tensor) or not isinstance(other, Tensor) or other is value:
                    continue
                if value.shape != other.shape or len(value) != 1:
                    raise ValueError(
                        f"Prompts of this text encoder carry {name} of one image only, so that an image and its edit "
                        "cannot be sampled together: use a model of another family."
                    )
                if name == "pooled_output" or not torch.equal(value, other):
                    joined[name] = torch.cat([value, other])
            pairs.append([torch.cat([rows, edit_rows.to(rows)]), joined])
    return pairs
