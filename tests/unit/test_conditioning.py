"""Learned rows in a CONDITIONING: where they go, what stays, and what is refused."""

from __future__ import annotations

import pytest
import torch

from likeness.core.prompt.conditioning import (
    TAIL,
    apply_embedding,
    check_room,
    padding_rows,
    single_prompt,
    start_rows,
    with_room,
)

D = 8


def prompt(rows: int = 77, end: int | None = 6, width: int = D, **options) -> list:
    text = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(rows))
    if end is not None:
        options["pooled_output"] = text[:, end].clone()
    return [[text, options]]


def tail(n: int = 5, width: int = D) -> torch.Tensor:
    return torch.randn(1, n, width, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("rows", [77, 154])
def test_the_last_rows_of_the_whole_prompt_are_replaced(rows):
    source = prompt(rows)
    ((text, options),) = apply_embedding(source, tail(), 0.8)
    assert torch.equal(text[:, :-5], source[0][0][:, :-5])
    assert torch.allclose(text[:, -5:], 0.8 * tail())
    assert text.shape == source[0][0].shape and options is not source[0][1]


def test_batched_rows_get_the_subject_in_every_row():
    source = [[torch.randn(3, 77, D), {}]]
    ((text, _),) = apply_embedding(source, tail(), 1.0)
    assert torch.equal(text[:, -5:], tail().expand(3, -1, -1))


def test_two_embeddings_do_not_go_into_the_same_rows():
    once = apply_embedding(prompt(end=None), tail(), 0.8)
    with pytest.raises(ValueError, match="holds an embedding already, in its last 5 rows.*Conditioning Combine"):
        apply_embedding(once, tail(3), 0.8)
    off = apply_embedding(prompt(end=None), tail(), 0.0)
    apply_embedding(off, tail(3), 0.8)
    more = [[torch.cat([once[0][0], torch.randn(1, 77, D)], 1), once[0][1]]]  # Conditioning Concat: its own last rows
    apply_embedding(more, tail(3), 0.8)


def test_every_entry_is_treated_and_keeps_its_options():
    first, second = prompt(start_percent=0.0, end_percent=0.5)[0], prompt(mask=torch.ones(1, 4, 4), strength=0.3)[0]
    result = apply_embedding([first, second], tail(), 1.0)
    assert [set(options) for _, options in result] == [{*first[1], TAIL}, {*second[1], TAIL}]
    assert result[0][1]["end_percent"] == 0.5 and result[1][1]["strength"] == 0.3
    assert all(torch.equal(text[:, -5:], tail()) for text, _ in result)


def test_inputs_are_not_changed():
    source = prompt()
    before = source[0][0].clone()
    apply_embedding(source, tail(), 0.8)
    assert torch.equal(source[0][0], before)


def test_scale_zero_is_off():
    source = prompt()
    ((text, _),) = apply_embedding(source, tail(), 0.0)
    assert torch.equal(text, source[0][0])


def test_padding_is_counted_from_the_end_of_text():
    ((text, options),) = prompt(end=70)
    assert padding_rows(text, options["pooled_output"]) == 6
    assert padding_rows(text, None) is None
    assert padding_rows(text, torch.randn(1, D) * 5) is None
    assert padding_rows(torch.randn(1, 154, D), options["pooled_output"]) is None


def test_rows_that_would_overwrite_words_are_refused(caplog):
    with pytest.raises(ValueError, match="only 4 unused.*shorten the prompt by 1 tokens"):
        apply_embedding(prompt(end=72), tail(5), 1.0)
    check_room(prompt(end=71), 5)
    assert not caplog.records
    check_room(prompt(end=None), 5)
    assert "cannot be told" in caplog.text
    with pytest.raises(ValueError, match="do not fit"):
        check_room(prompt(end=None), 76)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="width 8, the prompt rows of width 16"):
        apply_embedding(prompt(width=16), tail(), 1.0)


def test_training_prompts_must_be_plain():
    assert single_prompt(prompt(), "source prompt").shape == (1, 77, D)
    with pytest.raises(ValueError, match="2 prompts, expected one"):
        single_prompt(prompt() + prompt(), "source prompt")
    with pytest.raises(ValueError, match="limited by end_percent, start_percent"):
        single_prompt(prompt(start_percent=0.1, end_percent=1.0), "source prompt")
    with pytest.raises(ValueError, match="limited by a strength of 0"):
        single_prompt(prompt(strength=0.0), "source prompt")
    with pytest.raises(ValueError, match="no single table"):
        single_prompt([[torch.randn(2, 77, D), {}]], "source prompt")


def test_start_rows():
    text, empty = prompt()[0][0], prompt(154)[0][0]
    assert torch.equal(start_rows(text, None, 5), text[0, -5:])
    assert torch.equal(start_rows(text, empty, 5), empty[0, -5:])
    with pytest.raises(ValueError, match="one text encoder"):
        start_rows(text, prompt(width=16)[0][0], 5)


def test_an_appended_embedding_leaves_every_word_and_the_model_looks_at_it():
    rows, words = torch.randn(1, 3, D), torch.randn(1, 9, D)
    options = {"pooled_output": None, "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    ((text, seen),) = apply_embedding([[words, options]], rows, 0.5, (), "append")
    assert torch.equal(text[:, :9], words) and torch.equal(text[:, 9:], 0.5 * rows)
    assert seen["attention_mask"].tolist() == [[1] * 12] and options["attention_mask"].shape == (1, 9)
    ((twice, _),) = apply_embedding([[text, seen]], rows, 1.0, (), "append")
    assert torch.equal(twice[:, :12], text) and twice.shape[1] == 15


def test_masked_padding_is_looked_at_where_an_embedding_stands():
    mask = (torch.arange(9) < 4).long()[None]
    ((text, options),) = with_room([[torch.randn(1, 9, D), {"attention_mask": mask}]], 2, "tail")
    assert options["attention_mask"].tolist() == [[1] * 4 + [0] * 3 + [1] * 2] and text.shape[1] == 9
    assert mask.sum() == 4


def test_as_many_tokens_start_as_are_learned():
    text = torch.arange(6.0).view(1, 3, 2)
    assert start_rows(text, None, 5)[:, 0].tolist() == [2, 4, 0, 2, 4]
