"""Prompt-to-prompt's word swap and the maps of attention, on numbers."""

from __future__ import annotations

import pytest
import torch

from likeness.core.attention import maps
from likeness.core.attention.maps import (
    column_probabilities,
    mean_over_layers,
    normalize_maps,
    probabilities,
    token_maps,
)
from likeness.core.attention.prompt_to_prompt import (
    Swap,
    blend_mask,
    blend_predictions,
    column_map,
    controlled_attention,
    correction,
    edit_columns,
    joint_correction,
    token_swap,
    word_swap,
)

ROWS = 9


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("source", "edit", "word", "swap"),
    [
        ("a cat here", "a dog here", "cat", Swap(2, 1, 1)),
        ("a cat here", "a big dog here", "cat", Swap(2, 1, 2)),
        ("cat", "big grey dog", "cat", Swap(1, 1, 3)),
        ("the grey cat", "the dog", "grey cat", Swap(2, 2, 1)),
        ("a a cat", "a a cat", "cat", Swap(3, 1, 1)),
    ],
)
def test_a_word_is_found_by_its_tokens(source, edit, word, swap):
    assert word_swap(source.split(), edit.split(), word.split()) == swap


@pytest.mark.parametrize(
    ("source", "edit", "word", "message"),
    [
        ("a cat here", "a dog here", "dog", "0 times"),
        ("a cat a cat", "a dog a cat", "cat", "2 times"),
        ("a cat here", "the dog here", "cat", "more than the word"),
        ("a cat here", "a dog there", "cat", "more than the word"),
        ("a cat here", "a here", "cat", "more than the word"),
    ],
)
def test_what_is_no_swap_of_that_word_is_refused(source, edit, word, message):
    with pytest.raises(ValueError, match=message):
        word_swap(source.split(), edit.split(), word.split())


def written_out(swap: Swap) -> torch.Tensor:
    """Map for one word, from the places alone."""
    found = torch.zeros(ROWS, ROWS)
    for j in range(ROWS):
        offset = j - swap.start
        if offset < 0:
            found[j, j] = 1
        elif offset >= swap.new:
            found[min(j + swap.old - swap.new, ROWS - 1), j] = 1
        elif swap.new == swap.old:
            found[j, j] = 1
        else:
            for k in range(swap.old):
                found[swap.start + k, j] = 1 / swap.new
    return found


@pytest.mark.parametrize(
    "swap", [Swap(3, 1, 1), Swap(3, 2, 2), Swap(3, 1, 2), Swap(3, 2, 1), Swap(1, 3, 2), Swap(7, 1, 2)]
)
def test_rows_behind_a_longer_or_shorter_word_move(swap):
    assert torch.equal(column_map(swap, ROWS), written_out(swap))
    kept = column_map(swap, ROWS).sum(1)[: ROWS - max(swap.new - swap.old, 1)]
    torch.testing.assert_close(kept, torch.ones_like(kept))  # a word's attention is shared, not lost or doubled
    assert column_map(swap, ROWS).sum(0).all()  # the edit's last rows are looked at too


def test_the_edit_s_own_rows_are_the_word_and_the_tail():
    assert edit_columns(Swap(3, 1, 2), ROWS, tail=2).nonzero().flatten().tolist() == [3, 4, 7, 8]
    assert edit_columns(Swap(3, 1, 1), ROWS).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("times", [1, 2])
def test_own_columns_come_from_the_edit_and_the_rest_from_the_source(times):
    source, edit = (drawn(2, 5, times * ROWS, seed=seed).softmax(-1) for seed in (1, 2))
    swap = Swap(2, 1, 2)
    found = controlled_attention(source, edit, column_map(swap, ROWS), edit_columns(swap, ROWS, 1))
    for copy in range(times):
        at = copy * ROWS
        assert torch.equal(found[..., at : at + 2], source[..., at : at + 2])
        assert torch.equal(found[..., at + 2 : at + 4], edit[..., at + 2 : at + 4])
        assert torch.equal(found[..., at + 4 : at + 8], source[..., at + 3 : at + 7])
        assert torch.equal(found[..., at + 8], edit[..., at + 8])
    whole = controlled_attention(source, edit, column_map(swap, ROWS), edit_columns(swap, ROWS, 1), renormalise=True)
    torch.testing.assert_close(whole, found / found.sum(-1, keepdim=True))


def test_the_correction_brings_the_edit_to_the_controlled_attention():
    """Own attention plus correction, beside torch's attention with the source's queries and keys."""
    heads, swap = 2, Swap(3, 1, 1)
    q, k, v = drawn(2, 6, 8, seed=1), drawn(2, ROWS, 8, seed=2), drawn(2, ROWS, 8, seed=3)

    def attention(q, k, v):
        parts = (each.unflatten(-1, (heads, -1)).transpose(0, 1) for each in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1)

    nothing, everything = torch.zeros(ROWS, dtype=torch.bool), torch.ones(ROWS, dtype=torch.bool)
    change = correction(q, k, v, heads, column_map(swap, ROWS), nothing)
    torch.testing.assert_close(attention(q[1], k[1], v[1]) + change, attention(q[0], k[0], v[1]))
    assert not correction(q, k, v, heads, column_map(swap, ROWS), everything).any()
    assert not correction(q[:1].expand(2, -1, -1), k[:1].expand(2, -1, -1), v, heads, torch.eye(ROWS), nothing).any()


def test_probabilities_and_their_pictures():
    attention = probabilities(drawn(2, 6, 8), drawn(2, ROWS, 8, seed=1), 2)
    assert attention.shape == (2, 2, 6, ROWS)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 6))
    found = token_maps(attention, (2, 3))
    assert found.shape == (2, ROWS, 2, 3)
    torch.testing.assert_close(found[1, 4, 1, 2], attention[1, :, 5, 4].mean())


def test_layers_of_all_sizes_count_alike_and_maps_are_stretched():
    small, large = torch.full((1, 3, 2, 2), 0.25), torch.full((1, 3, 4, 4), 0.75)
    torch.testing.assert_close(mean_over_layers([small, large], (4, 4)), torch.full((1, 3, 4, 4), 0.5))
    found = normalize_maps(torch.tensor([[0.2, 0.3], [0.25, 0.4]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5], [0.25, 1.0]]))
    assert not normalize_maps(torch.full((2, 2), 0.3)).any()


def test_blended_predictions_leave_the_edit_as_the_source_outside_of_the_mask():
    x, denoised, mask = drawn(2, 4, 6, 5), drawn(2, 4, 6, 5, seed=1), torch.zeros(1, 6, 5, dtype=torch.bool)
    mask[:, 2:4, 1:3] = True
    for sigma, following in ((3.0, 2.0), (0.5, 0.0)):
        found = blend_predictions(x, denoised, sigma, following, mask)
        after, plain = (x + (following - sigma) * (x - d) / sigma for d in (found, denoised))
        assert torch.equal(found[0], denoised[0])
        torch.testing.assert_close(after[1], torch.where(mask, plain[1], plain[0]))


def test_the_blend_s_mask_is_where_either_word_is_looked_at():
    looked = torch.full((2, 64, 64), 0.02)
    looked[0, 10, 10], looked[1, 50, 50], looked[1, 30, 30] = 0.1, 0.5, 0.1
    found = blend_mask(looked, 0.3)[0]
    assert found[6:15, 6:15].all() and found[46:55, 46:55].all()  # the neighbourhood: 4 cells of 64 to each side
    assert int(found.sum()) == 2 * 81
    assert blend_mask(looked, 0.1)[0, 30, 30]


@pytest.mark.parametrize(
    ("source", "edit", "swap"),
    [
        ("a cat here", "a dog here", Swap(1, 1, 1)),
        ("a cat here", "a big dog here", Swap(1, 1, 2)),
        ("a cat here", "a big cat here", Swap(0, 1, 2)),  # at least one token of each
        ("a big cat here", "a cat here", Swap(0, 2, 1)),
        ("cat", "big cat", Swap(0, 1, 2)),
        ("cat a", "cat a", None),
        ("a a a", "a a", Swap(1, 2, 1)),
    ],
)
def test_the_part_in_which_two_prompts_differ(source, edit, swap):
    assert token_swap(source.split(), edit.split()) == swap


def test_a_swap_of_one_encoder_leaves_the_others_tokens():
    found = column_map(Swap(1, 1, 3, 5), ROWS)
    assert torch.equal(found[:5, :5], column_map(Swap(1, 1, 3), 5))
    assert torch.equal(found[5:, 5:], torch.eye(ROWS - 5)) and not found[:5, 5:].any() and not found[5:, :5].any()


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_joint_attention_is_controlled_as_on_the_whole_table(renormalise, masked, monkeypatch):
    """A part of the queries at a time; the prompt's columns are some of the keys."""
    cells, keys, text = 7, 5 + ROWS, slice(3, 3 + ROWS)
    q, k, v = drawn(2, 2, cells, 4), drawn(2, 2, keys, 4, seed=1), drawn(2, 2, keys, 4, seed=2)
    mask = drawn(1, 1, cells, keys, seed=3) if masked else None
    mapping, is_edit = column_map(Swap(2, 1, 2), ROWS), edit_columns(Swap(2, 1, 2), ROWS)
    table = (q @ k.mT / 2 + (mask if masked else 0)).softmax(-1)
    expected = table[1].clone()
    expected[..., text] = controlled_attention(table[0, ..., text], table[1, ..., text], mapping, is_edit)
    if renormalise:
        expected = expected / expected.sum(-1, keepdim=True)
    monkeypatch.setattr(maps, "SCORES", 2 * 2 * keys * 3)
    parts = list(column_probabilities(q, k, text, mask))
    assert [part.start for part, _ in parts] == [0, 3, 6]
    out = table[1] @ v[1]
    joint_correction(parts, out, v[1, :, text], mapping, is_edit, renormalise)
    torch.testing.assert_close(out, expected @ v[1])
