"""A mask of the surroundings, as Load Image gives it for a transparent image, is turned over, and only such a one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from likeness.core.session.images import checked_mask, subject_mask

SIZE = 64


def subject(top: float, bottom: float, left: float, right: float) -> Tensor:
    """[1, SIZE, SIZE], white in a box of fractions."""
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, int(top * SIZE) : int(bottom * SIZE), int(left * SIZE) : int(right * SIZE)] = 1
    return mask


CUT_OUTS = {
    "in the middle": subject(0.2, 0.8, 0.2, 0.8),
    "a bust": subject(0.15, 1.0, 0.2, 0.8),
    "a standing figure": subject(0.0, 1.0, 0.3, 0.7),
    "in a corner": subject(0.2, 1.0, 0.2, 1.0),
    "two corners": subject(0.3, 1.0, 0.1, 1.0),
}
LEFT_ALONE = {
    **CUT_OUTS,
    "everything": torch.ones(1, SIZE, SIZE),
    "nothing": torch.zeros(1, SIZE, SIZE),
    "a bust that fills the lower edge": subject(0.2, 1.0, 0.0, 1.0),
    "all but a small mark": 1 - subject(0.1, 0.2, 0.1, 0.2),
    "the left half": subject(0.0, 1.0, 0.0, 0.5),
    "a close-up": subject(0.0, 1.0, 0.0, 1.0) - subject(0.0, 0.1, 0.0, 0.4),
}


@pytest.mark.parametrize("case", CUT_OUTS)
def test_surroundings_are_turned_over_and_it_is_said(case, caplog):
    with caplog.at_level(logging.INFO, "likeness"):
        assert torch.equal(subject_mask(1 - CUT_OUTS[case]), CUT_OUTS[case])
    assert "as Load Image gives it for a transparent image" in caplog.text


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_the_mask_of_a_subject_is_left_alone(case, caplog):
    with caplog.at_level(logging.INFO, "likeness"):
        assert torch.equal(subject_mask(LEFT_ALONE[case]), LEFT_ALONE[case])
    assert not caplog.text


def test_each_mask_of_a_batch_by_itself():
    right, wrong = CUT_OUTS["a bust"], 1 - CUT_OUTS["in a corner"]
    turned = checked_mask(torch.cat([right, wrong]), 2, (SIZE, SIZE), subject=True)
    assert torch.equal(turned, torch.cat([right, 1 - wrong]))
    assert torch.equal(checked_mask(wrong, 1, (SIZE, SIZE)), wrong), "the place of an edit may be the surroundings"


def test_what_cannot_be_told_is_said(caplog):
    """The surroundings of a bust that fills the lower edge are white along a third of the border."""
    surroundings = 1 - LEFT_ALONE["a bust that fills the lower edge"]
    assert torch.equal(subject_mask(surroundings), surroundings)
    assert "white must be the subject" in caplog.text and "Invert Mask" in caplog.text
