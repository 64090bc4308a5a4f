"""LPIPS from weight files: both backbones, both file kinds, against the published layer arithmetic; and refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.testing import assert_close

from likeness.core.vision.host.extras.lpips_files import load_lpips

from .models import pictures

WIDTHS = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}
ALEXNET = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
VGG16 = dict(
    zip(
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        [(3, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), *[(256, 256, 3)] * 2]
        + [(256, 512, 3), *[(512, 512, 3)] * 5],
        strict=True,
    )
)
CONVOLUTIONS = {"alexnet": ALEXNET, "vgg16": VGG16}  # index: channels in, channels out, kernel


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def backbone(net: str, prefix: str = "features.") -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, with a classifier that nobody needs."""
    state = {"classifier.1.weight": drawn((3, 3), 9)}
    for i, (before, after, kernel) in CONVOLUTIONS[net].items():
        scale = (2.0 / (before * kernel * kernel)) ** 0.5
        state[f"{prefix}{i}.weight"] = drawn((after, before, kernel, kernel), i) * scale
        state[f"{prefix}{i}.bias"] = drawn((after,), i + 100) * 0.1
    return state


def heads(net: str) -> dict[str, torch.Tensor]:
    return {f"lin{i}.model.1.weight": drawn((1, width, 1, 1), 50 + i).abs() for i, width in enumerate(WIDTHS[net])}


def write(folder, net: str, suffix: str):
    """Heads and backbone as two files; returns the heads' path."""
    save = save_file if suffix == ".safetensors" else torch.save
    short = {"alexnet": "alex", "vgg16": "vgg"}[net]
    save(heads(net), folder / f"{short}{suffix}")
    save(backbone(net), folder / f"{net}-1234{suffix}")
    return folder / f"{short}{suffix}"


def published(net: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance written out with plain functional calls."""
    state, total = backbone(net), 0.0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = []
    for image in (a, b):
        x, kept = (((image * 2 - 1) - shift) / scale).movedim(-1, 1), []
        for i in CONVOLUTIONS[net]:
            if net == "alexnet":
                if i in (3, 6):
                    x = functional.max_pool2d(x, 3, 2)
                how = {0: {"stride": 4, "padding": 2}, 3: {"padding": 2}}.get(i, {"padding": 1})
            else:
                if i in (5, 10, 17, 24):
                    x = functional.max_pool2d(x, 2, 2)
                how = {"padding": 1}
            x = functional.relu(functional.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], **how))
            if net == "alexnet" or i in (2, 7, 14, 21, 28):
                kept.append(functional.normalize(x, dim=1))
        maps.append(kept)
    for u, v, head in zip(*maps, heads(net).values(), strict=True):
        total += float((functional.conv2d((u - v) ** 2, head)).mean())
    return total


@pytest.mark.parametrize(("net", "suffix"), [("alexnet", ".pth"), ("alexnet", ".safetensors"), ("vgg16", ".pth")])
def test_distance_is_the_published_one(tmp_path, net, suffix):
    model = load_lpips(write(tmp_path, net, suffix), [str(tmp_path)])
    a, b = pictures(1, 64, 80, seed=1), pictures(1, 64, 80, seed=2)
    assert float(model(a, b)) == pytest.approx(published(net, a, b), rel=1e-4)
    assert float(model(a, a)) == 0.0
    assert f"{net}-1234{suffix}" in model.description


def test_the_authors_whole_model_in_one_file(tmp_path):
    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    whole = {name.replace("lin", "lins."): value for name, value in heads("alexnet").items()}
    for name, value in backbone("alexnet").items():
        if name.startswith("features."):
            whole[f"net.slice{slices[int(name.split('.')[1])]}.{name[9:]}"] = value
    torch.save(whole, tmp_path / "whole.pth")
    model = load_lpips(tmp_path / "whole.pth", [])
    a, b = pictures(1, 64, 64, seed=1), pictures(1, 64, 64, seed=2)
    assert float(model(a, b)) == pytest.approx(published("alexnet", a, b), rel=1e-4)


def test_weight_counts_only_where_it_is(tmp_path):
    model = load_lpips(write(tmp_path, "alexnet", ".pth"), [str(tmp_path)])
    a = pictures(1, 128, 128, seed=1)
    b = a.clone()
    b[:, :, :16] = 1.0 - b[:, :, :16]
    right = torch.zeros(1, 128, 128)
    right[:, :, 112:] = 1.0
    assert float(model(a, b, torch.ones(1, 128, 128))) == pytest.approx(float(model(a, b)), rel=1e-5)
    assert float(model(a, b, 1 - right)) > 20 * float(model(a, b, right))


def test_missing_backbone_is_named(tmp_path):
    path = write(tmp_path, "alexnet", ".pth")
    (tmp_path / "alexnet-1234.pth").unlink()
    with pytest.raises(ValueError, match="needs the weights of AlexNet"):
        load_lpips(path, [str(tmp_path)])


def test_other_heads_and_backbones_are_refused(tmp_path):
    path = write(tmp_path, "alexnet", ".pth")
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "alexnet-1234.pth")
    with pytest.raises(ValueError, match="does not hold the convolutions"):
        load_lpips(path, [str(tmp_path)])
    torch.save({"lin0.model.1.weight": torch.zeros(1, 7, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"widths \(7,\)"):
        load_lpips(path, [str(tmp_path)])
    torch.save({"lin0.model.1.weight": torch.tensor([float("nan")])}, path)
    with pytest.raises(ValueError, match="NaN"):
        load_lpips(path, [str(tmp_path)])


class Hostile:
    """Pickled, this would write a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    torch.save({"lin0.model.1.weight": Hostile(tmp_path / "ran")}, tmp_path / "alex.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_lpips(tmp_path / "alex.pth", [str(tmp_path)])
    assert not (tmp_path / "ran").exists()
    (tmp_path / "alex.pth").write_bytes(b"PK garbage")
    with pytest.raises(ValueError, match="alex.pth"):
        load_lpips(tmp_path / "alex.pth", [str(tmp_path)])


def test_gradient_reaches_the_pixels(tmp_path):
    model = load_lpips(write(tmp_path, "alexnet", ".pth"), [str(tmp_path)])
    a = pictures(1, 64, 64, seed=1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(a, pictures(1, 64, 64, seed=2)).sum(), a)
    assert bool(torch.isfinite(gradient).all()) and bool(gradient.any())
    assert_close(model.head0.grad, None)


def test_heads_in_half_precision_are_loaded_in_a_node_too(tmp_path):
    """Nodes run in inference mode, whose tensors cannot become parameters."""
    path = write(tmp_path, "alexnet", ".safetensors")
    save_file({name: value.half() for name, value in heads("alexnet").items()}, path)
    with torch.inference_mode():
        distance = load_lpips(path, [str(tmp_path)])(*(pictures(1, 96, 96, seed) for seed in (1, 2)))
    assert float(distance) > 0
