"""What hangs on a model is told apart by its numbers, and equal things stay equal."""

from __future__ import annotations

import functools

import numpy as np
import torch

from likeness.core.host.describe import describe
from likeness.core.runs import digest


def closing_over(value):
    return lambda x: x * value


def scaled(x, s=1, *, k=0):
    return x * s + k


def key(value) -> str:
    return digest(describe(value))


PAIRS = {
    "closures": (closing_over(1.0), closing_over(2.0)),
    "partials": (functools.partial(scaled, s=1), functools.partial(scaled, s=2)),
    "arrays": (np.arange(3), np.arange(3) + 1),
    "dtypes": (torch.float16, torch.float32),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "modules": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    "tensors": ({"a": torch.zeros(2)}, {"a": torch.ones(2)}),
}


def test_different_things_have_different_keys():
    assert [name for name, (first, second) in PAIRS.items() if key(first) == key(second)] == []


def test_equal_things_have_equal_keys():
    for name, (first, _) in PAIRS.items():
        assert key(first) == key(first), name
    assert key(closing_over(3.0)) == key(closing_over(3.0))
    assert key(functools.partial(scaled, s=3)) == key(functools.partial(scaled, s=3))


def test_what_cannot_be_told_apart_is_never_equal():
    class Closed:
        __slots__ = ("value",)

    assert key(Closed()) != key(Closed())


def test_cycles_end():
    ring: dict = {"a": 1}
    ring["self"] = ring
    assert key(ring) == key(ring)
