"""Number lists, pairs and the grid of a sweep over K and v."""

from __future__ import annotations

import random

import pytest
import torch

from likeness.core.sine.sweep import (
    MOST_NUMBERS,
    MOST_TEXT,
    grid,
    mean_of_each_pair,
    numbers,
    of_each_pair,
    pairs,
    timestep,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3, 0.5, 0.7", [0.3, 0.5, 0.7]),
        ("0.9 .5;1\n0,", [0.9, 0.5, 1.0, 0.0]),
        (" ,0.5, ", [0.5]),
        ("1.", [1.0]),
        ("5e-1", [0.5]),
        ("-0", [0.0]),
    ],
)
def test_numbers(text, expected):
    assert numbers(text, "base_weights") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty: give numbers"),
        (" ,;\n", "is empty: give numbers"),
        ("0.3, half", "'half', which is not a number"),
        ("nan", "'nan', which is not a number"),
        ("1e999", "not a number"),
        ("infinity", "not a number"),
        ("\u0661", "not a number"),  # an Arabic digit one, which float() would take
        ("0x1", "not a number"),
        ("1_0", "not a number"),
        ("__import__('os')", "not a number"),
        ("-0.1", "holds -0.1: give numbers from 0 to 1"),
        ("0,3", "holds 3: give numbers from 0 to 1, with a point"),
        ("0.5, 0.50", "holds 0.5 twice"),
        ("0." + "1" * 10_000, f"up to {MOST_NUMBERS} numbers"),
        (", ".join(f"{i / 100}" for i in range(MOST_NUMBERS + 1)), f"give {MOST_NUMBERS} at most"),
    ],
)
def test_what_is_no_list_of_numbers(text, sentence):
    with pytest.raises(ValueError, match="base_weights") as caught:
        numbers(text, "base_weights")
    assert sentence in str(caught.value) and len(str(caught.value)) < 200


def test_any_text_gives_numbers_in_range_or_one_sentence():
    generator = random.Random(0)
    for _ in range(3000):
        text = "".join(generator.choice("0123456789.,; -+eE\n\tna\u0663") for _ in range(generator.randrange(12)))
        try:
            found = numbers(text, "end_percents")
        except ValueError as error:
            assert str(error).startswith("end_percents ") and ": " in str(error)
        else:
            assert found and all(0.0 <= value <= 1.0 for value in found) and len(set(found)) == len(found)
    with pytest.raises(ValueError):
        numbers("1" * (MOST_TEXT + 1), "end_percents")


def test_pairs_run_row_by_row():
    assert pairs([0.3, 0.7], [0.2, 0.6]) == [(0.3, 0.2), (0.7, 0.2), (0.3, 0.6), (0.7, 0.6)]
    with pytest.raises(ValueError, match="20 base weights x 20 end percents are 400 images"):
        pairs([i / 20 for i in range(20)], [i / 20 for i in range(20)])


def test_every_result_lies_in_its_cell_whatever_the_order():
    made = pairs([0.7, 0.3, 0.5], [0.6, 0.2])
    order = random.Random(1).sample(range(6), 6)
    found = grid([made[i][0] for i in order], [made[i][1] for i in order])
    assert found.base_weights == (0.3, 0.5, 0.7) and found.end_percents == (0.2, 0.6)
    for row, end in enumerate(found.end_percents):
        for column, weight in enumerate(found.base_weights):
            at = found.places[row][column]
            assert at is not None and made[order[at]] == (weight, end)
    values = [weight + 10 * end for weight, end in (made[i] for i in order)]
    assert found.over_base_weight(values)[1] == [(0.3, 6.3), (0.5, 6.5), (0.7, 6.7)]
    assert found.over_end_percent(values)[0] == [(0.2, 2.3), (0.6, 6.3)]


def test_a_grid_with_holes_leaves_them_out_of_the_curves():
    found = grid([0.3, 0.7, 0.7], [0.2, 0.2, 0.6])
    assert found.places == ((0, 1), (None, 2))
    assert found.over_base_weight([1.0, 2.0, 3.0]) == [[(0.3, 1.0), (0.7, 2.0)], [(0.7, 3.0)]]


@pytest.mark.parametrize(
    ("weights", "ends", "sentence"),
    [
        ([0.3], [0.2, 0.4], "1 base weights came with 2"),
        ([], [], "connect both outputs"),
        ([0.3, 0.3], [0.2, 0.2], "came twice"),
        ([i / 200 for i in range(200)], [0.5] * 200, "200 pairs came"),
    ],
)
def test_what_is_no_grid(weights, ends, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid(weights, ends)


def test_percents_are_the_papers_timesteps():
    assert [timestep(percent) for percent in (0.0, 1 - 400 / 999, 0.6, 1.0)] == [999, 400, 400, 0]


def test_one_picture_for_each_pair():
    single = [torch.zeros(1, 4, 4, 3)] * 3
    assert len(of_each_pair(single, 3)) == len(of_each_pair([torch.zeros(3, 4, 4, 3)], 3)) == 3


@pytest.mark.parametrize("each", [2, 3, 5])
def test_several_images_of_a_pair_share_its_cell(each):
    """Image i is all of the value i: the first stands at the top left, the next at its right, and none in two cells."""
    images = torch.arange(3.0 * each)[:, None, None, None].expand(-1, 4, 6, 3)
    for batches in (images.split(each), images.split(1)):
        cells = of_each_pair(batches, 3)
        for index, cell in enumerate(cells):
            assert cell.shape == (8, 12 if each < 5 else 18, 3) if each > 2 else (4, 12, 3)
            assert cell[0, 0, 0] == index * each and cell[0, 6, 0] == index * each + 1
            tiles = {float(value) for value in cell.unique()} - {0.0}  # 0 is image 0, and an empty place
            assert tiles == {float(i) for i in range(index * each, index * each + each)} - {0.0}


def test_images_that_do_not_belong_to_the_pairs():
    for images in ([torch.zeros(4, 4, 4, 3)], [torch.zeros(5, 4, 4, 3), torch.zeros(1, 8, 4, 3)], []):
        with pytest.raises(ValueError, match="images came for 3 pairs: give the same number"):
            of_each_pair(images, 3)


def test_values_of_a_pair_become_their_mean():
    assert mean_of_each_pair([0.1, 0.2], 2, "distance") == [0.1, 0.2]
    assert mean_of_each_pair([0.0, 1.0, 2.0, 4.0, 6.0, 8.0], 2, "distance") == [1.0, 6.0]
