"""Masks are alike in all nodes: one rule for a mask of the surroundings, one for another proportion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .methods import METHODS, _similarity_model, autoencoder, run_node
from .setting import SharedSetting as Setting

METHOD = {method.name: method for method in METHODS}


def trained(name: str) -> Callable[[Setting, Tensor], list[Tensor]]:
    """What a method learns with a mask."""

    def of(setting: Setting, mask: Tensor) -> list[Tensor]:
        method = METHOD[name]
        tensors = method.tensors(method.fit(setting, mask=mask, steps=1)[0])
        return [tensors[part] for part in sorted(tensors)]

    return of


def encoded(setting: Setting, mask: Tensor) -> list[Tensor]:
    from likeness.nodes.adapter import LikenessEncodeSubject

    inputs = {"model": setting.model, "vae": autoencoder(), "positive": setting.source, "image": setting.image}
    return [run_node(LikenessEncodeSubject, **inputs, size=64, seed=0, mask=mask)[1]]


def compared(setting: Setting, mask: Tensor) -> list[Tensor]:
    from likeness.nodes.similarity import LikenessSimilarity

    inputs = {"vision": _similarity_model(), "image": setting.image, "weight": 1.0}
    return [part.references for part in run_node(LikenessSimilarity, **inputs, mask=mask)[0].parts]


def scored(name: str) -> Callable[[Setting, Tensor], list[Tensor]]:
    """The identity with one of the masks."""

    def of(setting: Setting, mask: Tensor) -> list[Tensor]:
        from likeness.nodes.score import LikenessScore

        inputs: dict[str, Any] = {"images": setting.image.flip(1), "reference": setting.image, name: mask}
        return [torch.tensor(run_node(LikenessScore, **inputs, dino=_similarity_model())[0])]

    return of


def aligned(setting: Setting, mask: Tensor) -> list[Tensor]:
    from likeness.nodes.reference import LikenessAlign

    target = torch.zeros(1, 64, 64)
    target[:, 20:50, 20:44] = 1.0
    return list(run_node(LikenessAlign, image=setting.image, mask=mask, target_mask=target)[:2])


USES = {
    **{name: trained(name) for name in ("hiper", "step-wise", "sine")},
    **{"encode": encoded, "similarity": compared, "align": aligned},
    **{name: scored(name) for name in ("mask", "reference_mask")},
}


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("use", USES)
def test_a_cut_out_is_the_subject_wherever_its_mask_comes_in(use, caplog):
    """A bust on the lower edge: Load Image gives the transparent part as the mask, which is white in two corners only
    or in none.
    """
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:, 8:] = 1.0
    caplog.set_level("INFO", "likeness")
    subject = USES[use](Setting(), mask)
    assert "turned over" not in caplog.text
    surroundings = USES[use](Setting(), 1 - mask)
    assert all(torch.equal(one, other) for one, other in zip(subject, surroundings, strict=True))
    served = use in ("hiper", "step-wise", "sine")  # the same run: what is asked for is there already
    assert "as Load Image gives it for a transparent image" in caplog.text or served


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("use", USES)
def test_a_mask_has_its_images_proportion_at_any_size(use):
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:40] = 1.0
    USES[use](Setting(), mask[:, ::2, ::2])
    with pytest.raises(
        ValueError, match=r"has 64 x 28 pixels, its image \d+ x \d+, which is another proportion: connect"
    ):
        USES[use](Setting(), mask[:, 18:46])
