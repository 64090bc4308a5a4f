"""Malformed values by the type of an input. The next one that somebody meets is one more row."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


def _with(shape: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.full(shape, 0.5)
    tensor.view(-1)[0] = value
    return tensor


def of_other_numbers(tensor: Tensor) -> dict[str, Tensor]:
    """A tensor in forms that no node computes with."""
    return {
        "8-bit floats": tensor.to(torch.float8_e4m3fn),
        "complex": tensor.to(torch.complex64),
        "without data": tensor.to("meta"),
        "sparse": tensor.to_sparse(),
    }


def prompt(**options: Any) -> list[Any]:
    return [[torch.zeros(1, 77, 768), options]]


class Other:
    """An object of no use."""


IMAGES = {
    "nothing like it": "a dog",
    "a list": [[0.5]],
    "no batch": torch.rand(64, 64, 3),
    "five axes": torch.rand(1, 1, 64, 64, 3),
    "an empty batch": torch.zeros(0, 64, 64, 3),
    "no pixels": torch.zeros(1, 0, 64, 3),
    "one channel": torch.rand(1, 64, 64, 1),
    "channels first": torch.rand(1, 64, 64, 1).movedim(-1, 1),
    "one pixel": torch.rand(1, 1, 1, 3),
    "too narrow": torch.rand(1, 96, 4, 3),
    "NaN": _with((1, 64, 64, 3), NAN),
    "infinite": _with((1, 64, 64, 3), INF),
    "bytes": torch.full((1, 64, 64, 3), 128, dtype=torch.uint8),
    "two channels": torch.rand(1, 64, 64, 2),
    "0 to 255": torch.full((1, 64, 64, 3), 128.0),
    "-1 to 1": _with((1, 64, 64, 3), -1.0),
    **of_other_numbers(torch.ones(1, 64, 64, 3)),
}
MASKS = {
    "nothing like it": "a dog",
    "one axis": torch.ones(64),
    "four axes": torch.ones(1, 64, 64, 1),
    "no pixels": torch.ones(1, 0, 64),
    "an empty batch": torch.ones(0, 64, 64),
    "NaN": _with((1, 64, 64), NAN),
    "bytes": torch.full((1, 64, 64), 255, dtype=torch.uint8),
    "0 to 255": torch.full((1, 64, 64), 255.0),
    "-1 to 1": _with((1, 64, 64), -1.0),
    **of_other_numbers(torch.ones(1, 64, 64)),
}
LATENTS = {
    "nothing like it": "a dog",
    "a tensor": torch.zeros(1, 4, 8, 8),
    "no samples": {},
    "samples of no kind": {"samples": [1]},
    "two axes": {"samples": torch.zeros(4, 8)},
    "three axes": {"samples": torch.zeros(4, 12, 12)},
    "an empty batch": {"samples": torch.zeros(0, 4, 8, 8)},
    "NaN": {"samples": _with((1, 4, 8, 8), NAN)},
    "whole numbers": {"samples": torch.ones(1, 4, 8, 8, dtype=torch.int64)},
    **{form: {"samples": value} for form, value in of_other_numbers(torch.ones(1, 4, 8, 8)).items()},
}
PROMPTS = {
    "nothing like it": "a dog",
    "empty": [],
    "no pairs": [torch.zeros(1, 77, 768)],
    "no tokens": [[None, {}]],
    "two axes": [[torch.zeros(77, 768), {}]],
    "an empty table": [[torch.zeros(1, 0, 768), {}]],
    "no options": [[torch.zeros(1, 77, 768), None]],
    "NaN": [[_with((1, 77, 768), NAN), {}]],
    "whole numbers": [[torch.ones(1, 77, 768, dtype=torch.int32), {}]],
    **{form: [[value, {}]] for form, value in of_other_numbers(torch.ones(1, 77, 768)).items()},
    "a ControlNet that is none": prompt(control=None),
    "a hook that is none": prompt(hooks="x"),
    "a GLIGEN without a model": prompt(gligen=("position", None, [])),
    "no area": prompt(area=None),
    "no mask": prompt(mask=None),
    "a strength of NaN": prompt(strength=NAN),
    "a mask's strength of no kind": prompt(mask=torch.ones(1, 8, 8), mask_strength=None),
    "an infinite end": prompt(start_percent=0.0, end_percent=INF),
    "a start that is a text": prompt(start_percent="a", end_percent=1.0),
    "a pooled output of NaN": prompt(pooled_output=_with((1, 768), NAN)),
    "a pooled output of no kind": prompt(pooled_output=[0.5]),
    "a pooled output without a batch": prompt(pooled_output=torch.zeros(768)),
}
SIGMAS = {
    "nothing like it": "a dog",
    "a list": [1.0, 0.0],
    "one level": torch.tensor([1.0]),
    "none": torch.tensor([]),
    "two axes": torch.ones(2, 2),
    "rising": torch.tensor([0.0, 1.0, 14.0]),
    "equal ones": torch.tensor([14.0, 1.0, 1.0, 0.0]),
    "negative": torch.tensor([1.0, -1.0]),
    "NaN": torch.tensor([14.0, NAN, 0.0]),
    "infinite": torch.tensor([INF, 1.0, 0.0]),
    "whole numbers": torch.tensor([14, 1, 0]),
    **of_other_numbers(torch.tensor([14.0, 1.0, 0.0])),
}
NUMBERS = {"a text": "five", "nothing": None, "NaN": NAN, "infinite": -INF, "a list": [1], "beyond all": 10**400}
OBJECTS = {"a text": "a dog", "a number": 5, "an object of no use": Other(), "a tensor": torch.zeros(2)}
BY_TYPE: dict[str, dict[str, Any]] = {
    "IMAGE": IMAGES,
    "MASK": MASKS,
    "LATENT": LATENTS,
    "CONDITIONING": PROMPTS,
    "SIGMAS": SIGMAS,
    "FLOAT": NUMBERS,
    "INT": {**NUMBERS, "half": 1.5},
    "BOOLEAN": {"a text": "yes", "two": 2, "NaN": NAN, "a list": [True]},
    "COMBO": {"unknown": "zzz", "a number": 5, "a list": ["LoRA"], "a lone surrogate": "\ud800"},
    "STRING": {"a lone surrogate": "\ud800", "a number": 5, "a list": ["a"], "a megabyte": "x" * 2**20},
}
TEXTS = {
    "a lone surrogate": "\ud800",
    "Chinese": "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a",
    "right to left": "\u0643\u0644\u0628",
    "emoji": "\U0001f415" * 5,
    "a zero byte": "a\0b",
    "escapes": "\x1b[31m%s%n{0}",
    "empty": "",
    "only blanks": " \t\r\n ",
    "long": "dog " * 5000,
}


WELL_FORMED: dict[str, Any] = {
    "IMAGE": torch.full((1, 64, 64, 3), 0.5),
    "MASK": torch.ones(1, 64, 64),
    "LATENT": {"samples": torch.zeros(1, 4, 8, 8)},
    "CONDITIONING": [[torch.zeros(1, 77, 768), {}]],
    "SIGMAS": torch.tensor([14.0, 1.0, 0.0]),
    "STRING": "a dog",
    "BOOLEAN": True,
    "CLIP": SimpleNamespace(tokenize=lambda _text, **_: {"l": [[]]}, clone=None, patcher=None),
}
"""What passes the checks of an input, no more."""


def malformed(kind: str, options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(what it is, the value) of all that an input of this type must refuse. options: of its widget."""
    yield from BY_TYPE.get(kind, OBJECTS).items()
    if kind in ("INT", "FLOAT"):
        for name, bound, sign in (("below the range", "min", -1), ("above the range", "max", 1)):
            if options.get(bound) is not None:
                yield name, options[bound] + sign


UNFIT: dict[str, dict[str, Any]] = {
    "CONDITIONING": {
        "another width": [[torch.zeros(1, 77, 96), {}]],
        "one token": [[torch.zeros(1, 1, 768), {}]],
        "two prompts in one": [[torch.zeros(2, 77, 768), {}]],
    },
    "LATENT": {
        "another model's channels": {"samples": torch.zeros(1, 16, 12, 12)},
        "a video's axis": {"samples": torch.zeros(1, 4, 1, 12, 12)},
        "one cell": {"samples": torch.zeros(1, 4, 1, 1)},
    },
    "IMAGE": {
        "8 pixels": torch.full((1, 8, 8, 3), 0.5),
        "an odd size": torch.full((1, 65, 71, 3), 0.5),
        "with transparency": torch.full((1, 96, 96, 4), 0.5),
        "three of them": torch.rand(3, 96, 96, 3, generator=torch.Generator().manual_seed(0)),
        "very wide": torch.full((1, 16, 512, 3), 0.5),
    },
    "MASK": {
        "another proportion": torch.ones(1, 40, 90),
        "three of them": torch.ones(3, 96, 96),
        "all black": torch.zeros(1, 96, 96),
        "all white": torch.ones(1, 96, 96),
        "without a batch": torch.ones(96, 96),
        "one pixel": torch.ones(1, 1, 1),
    },
    "SIGMAS": {
        "beyond the schedule": torch.tensor([1e6, 1.0, 0.0]),
        "never at 0": torch.tensor([14.0, 7.0, 1.0]),
    },
}
"""Well-formed values that do not fit a small SD1.5: a result, or a sentence."""
