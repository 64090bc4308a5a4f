"""The instance-retrieval file: read without running code in it, refused when it is something else."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from likeness.core.instance_retrieval import Backbone, InstanceRetrieval

from .models import pictures, seeded


def published() -> dict[str, torch.Tensor]:
    """Random weights of the published layout, narrow; with the classifier of its training."""
    model = seeded(lambda: InstanceRetrieval(Backbone(80, 2, 1, 16, 577), 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return {**model.state_dict(), "fc2.weight": torch.zeros(3, 8)}


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_kinds_of_files_give_the_same_features(tmp_path, ending, prefix):
    from likeness.core.host.vision import embed, load_instance_retrieval

    tensors = {prefix + name: value.clone() for name, value in published().items()}
    path = tmp_path / f"ir{ending}"
    torch.save(tensors, path) if ending == ".pth" else save_file(tensors, path)
    with torch.inference_mode():
        vision = load_instance_retrieval(path)
        found = embed(vision, pictures(2))
        other = embed(vision, pictures(2).flip(0))
    assert found.shape == (2, 8) and torch.equal(found, other.flip(0)) and float(found.std()) > 0
    assert "instance retrieval, 8 numbers" in vision.describe() and vision.image_size == 290


def test_other_files_are_refused(tmp_path):
    from likeness.core.host.vision import load_instance_retrieval

    class Code:
        def __reduce__(self):
            return (print, ("this ran",))

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="not a plain tensor file"):
        load_instance_retrieval(tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="table of tensors"):
        load_instance_retrieval(tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights"):
        load_instance_retrieval(tmp_path / "other.pth")
