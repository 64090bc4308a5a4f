"""Files of fine-tunes: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from likeness.core.files import HEADER_KEY, write_tensors
from likeness.core.lora.artifact import (
    KIND,
    MODEL_PREFIXES,
    TEXT_PREFIXES,
    FineTunedWeights,
    save_fine_tune,
    weight_differences,
)
from likeness.core.sine.artifact import load_fine_tune, summary
from likeness.core.sine.position_map import MARKER, marker, needed_map

PATH = "diffusion_model.middle_block.1.proj_in"


def tensors(rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{PATH}.lora_up.weight": torch.randn(6, rank, generator=generator),
        f"{PATH}.lora_down.weight": torch.randn(rank, 5, generator=generator),
        f"{PATH}.alpha": torch.tensor(2.0),
    }


HEADER = {
    "method": "sine",
    "prompt": "photo of a sks dog",
    "base": {"family": "SD15", "prediction": "EPS"},
    "settings": {"steps": 7, "seed": 0},
    "losses": [0.5, 0.25],
}


def test_what_is_saved_is_loaded(tmp_path):
    tuned = FineTunedWeights({**tensors(), **marker(64, "nearest")}, HEADER)
    save_fine_tune(tmp_path / "a.safetensors", tuned)
    loaded = load_fine_tune(tmp_path / "a.safetensors")
    assert loaded.keys() == tuned.keys() and all(torch.equal(loaded[name], tuned[name]) for name in tuned)
    assert needed_map(loaded) == (64, "nearest") and loaded.prompt == HEADER["prompt"] and not loaded.full
    assert all(loaded.header[name] == value for name, value in HEADER.items())
    text = summary(loaded)
    for part in ("rank 2", "SD15 (EPS)", "photo of a sks dog", "64 cells, nearest", "steps 7", "last 0.2500", "UNet"):
        assert part in text


KOHYA = (
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_te1_text_model_encoder_layers_0_q_proj"),
    (".lora_down.weight", ".lora_up.weight"),
)
PEFT = (
    ("transformer.transformer_blocks.0.attn.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
    (".lora_A.weight", ".lora_B.weight"),
)


@pytest.mark.parametrize("names", [KOHYA, PEFT], ids=["scripts", "peft"])
def test_names_that_other_programs_read_are_ours_with_our_header_only(tmp_path, names):
    paths, ends = names
    found = {path + end: torch.ones((3, 5) if end == ends[0] else (6, 3)) for path in paths for end in ends}
    save_fine_tune(tmp_path / "a.safetensors", FineTunedWeights(found, HEADER))
    loaded = load_fine_tune(tmp_path / "a.safetensors")
    assert set(loaded.part(MODEL_PREFIXES)) == {paths[0] + end for end in ends}
    assert set(loaded.part(TEXT_PREFIXES)) == {paths[1] + end for end in ends}
    assert "rank 3 of the UNet and text encoder" in summary(loaded).replace("LoRA of ", "")
    save_file(found, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="not a fine-tune of this pack.*stock Load LoRA"):
        load_fine_tune(tmp_path / "b.safetensors")
    del found[paths[0] + ends[1]]
    save_fine_tune(tmp_path / "c.safetensors", FineTunedWeights(found, HEADER))
    with pytest.raises(ValueError, match="no matching pair"):
        load_fine_tune(tmp_path / "c.safetensors")


def test_a_stock_reader_finds_the_same_tensors(tmp_path):
    """Our writer streams the format itself; here the library reads it."""
    written = {
        **tensors(),
        "half": torch.arange(5).to(torch.float16),
        "brain": torch.arange(3).to(torch.bfloat16),
        "double": torch.arange(4).double(),
        "number": torch.tensor(3),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "none": torch.zeros(0, 3),
        "turned": torch.arange(6.0).view(2, 3).T,
        "yes": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "a.safetensors", written, {"x": '\u00e9"\\'})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in written.items())


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="0.1 KB, 0.0 KB are free"):
        save_fine_tune(tmp_path / "a.safetensors", FineTunedWeights(tensors(), HEADER))
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_stock_save_node_still_says_that_it_needs_its_map(tmp_path):
    save_file({**tensors(), **marker(128, "bilinear")}, tmp_path / "a.safetensors")
    loaded = load_fine_tune(tmp_path / "a.safetensors")
    assert needed_map(loaded) == (128, "bilinear") and loaded.prompt == ""
    assert "not recorded" in summary(loaded)


def test_differences_are_named_as_lora_files_name_them():
    before = {
        name: torch.ones(3)
        for name in ("diffusion_model.a.weight", "diffusion_model.a.bias", "diffusion_model.p", "diffusion_model.same")
    }
    after = {name: value + (0.0 if name.endswith("same") else 0.25) for name, value in before.items()}
    found = weight_differences(before, after)
    assert sorted(found) == ["diffusion_model.a.diff", "diffusion_model.a.diff_b", "diffusion_model.p.diff"]
    assert all(value.dtype == torch.float16 and float(value[0]) == 0.25 for value in found.values())
    assert FineTunedWeights(found).full and "all weights" in FineTunedWeights(found).describe()


def raw(path, header: dict) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def ours(path, found: dict[str, torch.Tensor], **header) -> None:
    """Also headers that write_tensors() refuses."""
    save_file(found, path, {HEADER_KEY: json.dumps({**HEADER, "kind": KIND, "format": 1, **header})})


def digits(path, count: int) -> None:
    """A header with an integer that Python refuses to read."""
    header = json.dumps({**HEADER, "kind": KIND, "format": 1, "losses": [5]}).replace("[5]", f"[{'1' * count}]")
    save_file(tensors(), path, {HEADER_KEY: header})


BAD = {
    "empty file": (lambda p: p.write_bytes(b""), "cut off"),
    "no tensors": (lambda p: raw(p, {}), "it is empty"),
    "a marker alone": (lambda p: ours(p, {MARKER: torch.tensor([64.0, 0.0])}), "it is empty"),
    "another lora": (
        lambda p: save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(2, 2)}, p),
        "not a fine-tune of this pack.*stock Load LoRA",
    ),
    "a path outside": (lambda p: ours(p, {"diffusion_model./../x.diff": torch.zeros(2)}), "not a fine-tune"),
    "endless name": (lambda p: ours(p, {f"diffusion_model.{'a' * 400}.diff": torch.zeros(2)}), "not a fine-tune"),
    "another kind": (lambda p: ours(p, tensors(), kind="embedding"), "not a fine-tune"),
    "newer": (lambda p: ours(p, tensors(), format=9), "update the pack"),
    "prompt is a number": (lambda p: ours(p, tensors(), prompt=5), "damaged header"),
    "prompt is a book": (lambda p: ours(p, tensors(), prompt="x" * 200_000), "damaged header"),
    "base is a list": (lambda p: ours(p, tensors(), base=[1]), "damaged header"),
    "losses are words": (lambda p: ours(p, tensors(), losses=["low"]), "damaged header"),
    "a loss is no number": (lambda p: ours(p, tensors(), losses=[float("nan")]), "damaged header"),
    "a loss is infinite": (lambda p: ours(p, tensors(), losses=[1.0, float("inf")]), "damaged header"),
    "endless losses": (lambda p: ours(p, tensors(), losses=[0.5] * 20_000), "damaged header"),
    "a loss beyond all numbers": (lambda p: ours(p, tensors(), losses=[10**400]), "damaged header"),
    "a loss of endless digits": (lambda p: digits(p, 5000), "damaged header"),
    "settings are a list": (lambda p: ours(p, tensors(), settings=[]), "damaged header"),
    "settings in settings": (lambda p: ours(p, tensors(), settings={"a": {"b": 1}}), "damaged header"),
    "a setting is a book": (lambda p: ours(p, tensors(), settings={"a": "x" * 1000}), "damaged header"),
    "a setting has a book's name": (lambda p: ours(p, tensors(), settings={"a" * 1000: 1}), "damaged header"),
    "a setting is infinite": (lambda p: ours(p, tensors(), settings={"a": float("-inf")}), "damaged header"),
    "a setting is no number": (lambda p: ours(p, tensors(), settings={"a": float("nan")}), "damaged header"),
    "a thousand settings": (lambda p: ours(p, tensors(), settings=dict.fromkeys(map(str, range(1000)), 1)), "damaged"),
    "base is a book": (lambda p: ours(p, tensors(), base={"family": "x" * 1000}), "damaged header"),
    "method is a book": (lambda p: ours(p, tensors(), method="x" * 1000), "damaged header"),
    "integers": (lambda p: ours(p, {f"{PATH}.diff": torch.zeros(2, dtype=torch.int32)}), "unexpected tensor"),
    "a vector as factor": (lambda p: ours(p, {f"{PATH}.lora_up.weight": torch.zeros(2)}), "unexpected tensor"),
    "half a pair": (
        lambda p: ours(p, {f"{PATH}.lora_up.weight": torch.zeros(6, 2)}),
        "no matching pair of factors for 'diffusion_model.middle_block.1.proj_in'",
    ),
    "pair of two ranks": (
        lambda p: ours(p, {**tensors(), f"{PATH}.lora_down.weight": torch.zeros(3, 5)}),
        "no matching pair of factors",
    ),
    "alpha is a table": (lambda p: ours(p, {f"{PATH}.alpha": torch.zeros(2)}), "unexpected tensor"),
    "not a number": (lambda p: ours(p, {f"{PATH}.diff": torch.full((2,), float("nan"))}), "NaN"),
    "map of no cells": (lambda p: ours(p, {**tensors(), MARKER: torch.zeros(2)}), "impossible position map"),
    "map of another shape": (lambda p: ours(p, {**tensors(), MARKER: torch.zeros(3)}), "impossible position map"),
    "map of no interpolation": (
        lambda p: ours(p, {**tensors(), MARKER: torch.tensor([64.0, 0.5])}),
        "impossible position map",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_a_sentence(tmp_path, name):
    make, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_fine_tune(path)
    assert "bad.safetensors" in str(caught.value)


OFFICIAL = {"model.diffusion_model.head_position_encode._float_tensor": torch.zeros(1), "x": torch.zeros(2)}


def test_the_authors_checkpoints_are_told_from_others(tmp_path):
    save_file(OFFICIAL, tmp_path / "a.safetensors")
    torch.save({"state_dict": OFFICIAL}, tmp_path / "b.ckpt")
    torch.save(OFFICIAL, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.ckpt", "c.pt"):
        with pytest.raises(ValueError, match=r"models/checkpoints.*Load Checkpoint.*Position Map"):
            load_fine_tune(tmp_path / name)


class Trap:
    """Runs code when it is unpickled: makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_run(tmp_path):
    torch.save({"state_dict": Trap(tmp_path / "trap")}, tmp_path / "a.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_bytes(b"nothing")
    for name in ("a.pt", "b.ckpt", "c.ckpt"):
        with pytest.raises(ValueError, match=r"not a .safetensors file"):
            load_fine_tune(tmp_path / name)
    assert not (tmp_path / "trap").exists()
