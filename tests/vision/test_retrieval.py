"""The instance-retrieval file: read without running code in it, refused when it is something else."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from likeness.core.vision.instance_retrieval import Backbone, RetrievalNetwork

from .models import pictures, seeded


def published() -> dict[str, torch.Tensor]:
    """Random weights of the published layout, narrow; with the classifier of its training."""
    model = seeded(lambda: RetrievalNetwork(Backbone(80, 2, 1, 16, 577), 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return {**model.state_dict(), "fc2.weight": torch.zeros(3, 8)}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_kinds_of_files_give_the_same_features(tmp_path, ending, prefix):
    from likeness.core.vision.host.vision import describe, embed, load_retrieval_model

    tensors = {prefix + name: value.clone() for name, value in published().items()}
    path = tmp_path / f"ir{ending}"
    torch.save(tensors, path) if ending == ".pth" else save_file(tensors, path)
    with torch.inference_mode():
        vision = load_retrieval_model(path)
        found = embed(vision, pictures(2))
        other = embed(vision, pictures(2).flip(0))
    assert found.shape == (2, 8) and torch.equal(found, other.flip(0)) and float(found.std()) > 0
    assert "instance retrieval, 8 numbers" in describe(vision) and vision.image_size == 290


def test_other_files_are_refused(tmp_path):
    from likeness.core.vision.host.vision import load_retrieval_model

    class Code:
        def __reduce__(self):
            return (print, ("this ran",))

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="not a plain tensor file"):
        load_retrieval_model(tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no table of weights"):
        load_retrieval_model(tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights"):
        load_retrieval_model(tmp_path / "other.pth")


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in published().items()}


WRONG = {
    "no blocks": lambda: {name: value for name, value in published().items() if "resblocks" not in name},
    "a huge block number": lambda: renamed("resblocks.1.", "resblocks.999999999."),
    "a block that has no number": lambda: renamed("resblocks.1.", "resblocks.one."),
    "a missing block": lambda: renamed("resblocks.0.", "resblocks.2."),
    "a missing tensor": lambda: {name: value for name, value in published().items() if "ln_post" not in name},
    "a tensor of another shape": lambda: {**published(), "fc1.bias": torch.zeros(3)},
    "an unknown tensor": lambda: {**published(), "backbone.more": torch.zeros(3)},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables_are_refused_without_building_what_they_name(case):
    from likeness.core.vision.instance_retrieval import from_published

    with pytest.raises(ValueError, match=r"not the weights of the instance-retrieval model \(.+\): choose"):
        from_published(WRONG[case]())


def test_a_table_inside_a_checkpoint_is_found(tmp_path):
    from likeness.core.vision.host.vision import load_retrieval_model

    torch.save({"state_dict": published(), "epoch": 3}, tmp_path / "ir.pth")
    with torch.inference_mode():
        assert load_retrieval_model(tmp_path / "ir.pth").image_size == 290
    torch.save({"state_dict": {3: torch.zeros(1)}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="no table of weights"):
        load_retrieval_model(tmp_path / "numbers.pth")
