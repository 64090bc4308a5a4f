"""Files: whole or absent when written, refused with a sentence when they are not what they should be."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from likeness.core.embedding.artifact import MAX_BYTES, Embedding, load_embedding, save_embedding
from likeness.core.files import read_tensors, read_weights, write_tensors
from likeness.core.fit.runs import RunStore, digest
from likeness.core.fit.train import stored_run


def embedding() -> Embedding:
    generator = torch.Generator().manual_seed(0)
    rows = {step: torch.randn(1, 5, 8, generator=generator) for step in (100, 1000, 1400)}
    return Embedding(rows, {"method": "hiper", "base": {"family": "SD15", "prediction": "EPS"}, "losses": [0.2, 0.1]})


def test_round_trip(tmp_path):
    save_embedding(tmp_path / "a.safetensors", embedding())
    loaded = load_embedding(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded.rows[step], rows) for step, rows in embedding().rows.items())
    assert loaded.header["base"] == {"family": "SD15", "prediction": "EPS"} and loaded.tokens == 5 and loaded.width == 8
    assert "saved steps: 100, 1000, 1400; recommended 1000" in loaded.describe() and "SD15" in loaded.describe()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.int8])
def test_small_numbers_are_written_as_they_are(tmp_path, dtype):
    value = torch.arange(4.0).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"x": value}, {})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors", 1000)[0]["x"].float(), value.float())


def test_what_the_loader_would_refuse_is_not_written(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="a loss or setting that is no finite number: train it again"):
        save_embedding(path, Embedding({1: torch.zeros(1, 2, 3)}, {"losses": [float("nan")]}))
    assert not list(tmp_path.iterdir())
    save_embedding(path, Embedding({10**7: torch.ones(1, 2, 3)}))
    assert list(load_embedding(path).rows) == [10**7]


def test_steps():
    assert torch.equal(embedding().at(0), embedding().rows[1000])
    assert torch.equal(embedding().at(1400), embedding().rows[1400])
    with pytest.raises(ValueError, match="Step 7 .* 100, 1000, 1400"):
        embedding().at(7)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_embedding(path, embedding())
    before = path.read_bytes()

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("likeness.core.files._write_safetensors", broken)
    with pytest.raises(OSError, match="disk full"):
        save_embedding(path, Embedding({1: torch.zeros(1, 2, 3)}))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def write_raw(path, header: bytes, length: int | None = None, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


def write_step_wise(path, windows) -> None:
    write_tensors(path, {"step_000001": torch.zeros(2, 5, 8)}, {"kind": "embedding", "format": 1, "windows": windows})


BAD_FILES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut off": lambda p: p.write_bytes(b"\x10\x00\x00"),
    "huge header": lambda p: write_raw(p, b"{}", length=1 << 60),
    "header not json": lambda p: write_raw(p, b"nonsense"),
    "tensor beyond the end": lambda p: write_raw(
        p,
        json.dumps({"step_000001": {"dtype": "F32", "shape": [1, 5, 8], "data_offsets": [0, 160]}}).encode(),
        body=b"x" * 9,
    ),
    "nan": lambda p: write_tensors(
        p, {"step_000001": torch.full((1, 5, 8), float("nan"))}, {"kind": "embedding", "format": 1}
    ),
    "another kind": lambda p: save_file({"step_000001": torch.zeros(1, 5, 8)}, p),
    "newer format": lambda p: write_tensors(
        p, {"step_000001": torch.zeros(1, 5, 8)}, {"kind": "embedding", "format": 99}
    ),
    "extra tensor": lambda p: write_tensors(p, {"x": torch.zeros(1, 5, 8)}, {"kind": "embedding", "format": 1}),
    "wrong dtype": lambda p: write_tensors(
        p, {"step_000001": torch.zeros(1, 5, 8).int()}, {"kind": "embedding", "format": 1}
    ),
    "two shapes": lambda p: write_tensors(
        p,
        {"step_000001": torch.zeros(1, 5, 8), "step_000002": torch.zeros(1, 5, 9)},
        {"kind": "embedding", "format": 1},
    ),
    "damaged base": lambda p: write_tensors(
        p, {"step_000001": torch.zeros(1, 5, 8)}, {"kind": "embedding", "format": 1, "base": "x"}
    ),
    "damaged losses": lambda p: write_tensors(
        p, {"step_000001": torch.zeros(1, 5, 8)}, {"kind": "embedding", "format": 1, "losses": ["a"]}
    ),
    "damaged settings": lambda p: write_tensors(
        p, {"step_000001": torch.zeros(1, 5, 8)}, {"kind": "embedding", "format": 1, "settings": [1]}
    ),
    "step-wise without windows": lambda p: write_step_wise(p, None),
    "a window too few": lambda p: write_step_wise(p, [[0, 1]]),
    "a gap between windows": lambda p: write_step_wise(p, [[0, 0.4], [0.5, 1]]),
    "windows that are words": lambda p: write_step_wise(p, [["a", "b"], ["b", "c"]]),
    "windows that are not numbers": lambda p: save_file(
        {"step_000001": torch.zeros(2, 5, 8)},
        p,
        metadata={"likeness": '{"kind": "embedding", "format": 1, "windows": [[0, NaN], [NaN, 1]]}'},
    ),
    "windows beyond the end": lambda p: write_step_wise(p, [[0, 2], [2, 1]]),
    "no tensors": lambda p: write_tensors(p, {}, {"kind": "embedding", "format": 1}),
    "header of the wrong shape": lambda p: save_file({"a": torch.zeros(1)}, p, metadata={"likeness": "[1, 2]"}),
    "header not parsable": lambda p: save_file({"a": torch.zeros(1)}, p, metadata={"likeness": "[" * 100_000}),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_a_sentence(tmp_path, name):
    path = tmp_path / "bad.safetensors"
    BAD_FILES[name](path)
    with pytest.raises(ValueError, match=r".{30,}") as refusal:
        load_embedding(path)
    assert ":" in str(refusal.value)


def test_an_oversized_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="bytes"):
        load_embedding(path)


def test_the_official_file_is_read_and_pickles_with_code_are_not(tmp_path):
    rows = torch.randn(1, 5, 768)
    torch.save(rows, tmp_path / "hiper_embeddings_step500.pt")
    loaded = load_embedding(tmp_path / "hiper_embeddings_step500.pt")
    assert torch.equal(loaded.at(500), rows)

    class Hostile:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save(Hostile(), tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="not a plain tensor file"):
        load_embedding(tmp_path / "hostile.pt")
    torch.save({"a": rows}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="one table of rows"):
        load_embedding(tmp_path / "dict.pt")


def test_digest_sees_every_value():
    base = {"a": [1, torch.arange(4.0)], "b": "x"}
    assert digest(base) == digest({"b": "x", "a": [1, torch.arange(4.0)]})
    changed = [{"a": [2, torch.arange(4.0)], "b": "x"}, {"a": [1, torch.arange(4.0).double()], "b": "x"}]
    changed += [{"a": [1, torch.arange(4.0).view(2, 2)], "b": "x"}, {"a": [1, torch.arange(4.0) + 1e-6], "b": "x"}]
    assert len({digest(value) for value in [base, *changed]}) == 5
    assert digest([1, 23]) != digest([12, 3])
    assert digest({"a": {"b": 1}, "c": 2}) != digest({"a": {"b": 1, "c": 2}})


def test_the_oldest_runs_are_removed_above_the_limit(tmp_path):
    store = RunStore(tmp_path, limit_bytes=9000)
    for index in range(4):
        store.save(f"{index}", {"x": torch.zeros(1000)}, {})
        time.sleep(0.02)
        if index >= 1:
            assert store.load("0") is not None  # used again, so it stays
        time.sleep(0.02)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "3"]


def test_a_run_above_the_limit_is_served_and_not_deleted(tmp_path):
    store = RunStore(tmp_path, limit_bytes=9000)
    store.save("small", {"x": torch.zeros(10)}, {})
    store.save("large", {"x": torch.ones(5000)}, {})
    found = store.load("large")
    assert found is not None and torch.equal(found["x"], torch.ones(5000))
    assert [path.stem for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's mapped files")
def test_a_run_that_was_read_can_be_written_again_anywhere(tmp_path):
    """Tensors of an open file are views of it, and Windows does not replace a file of which there are views."""
    store = RunStore(tmp_path)
    store.save("k", {"x": torch.arange(5000.0)}, {})
    with open("/proc/self/maps") as mapped:
        assert "k.safetensors" not in mapped.read()
    read = read_tensors(store.path("k"), 100_000)
    with open("/proc/self/maps") as mapped:
        assert "k.safetensors" in mapped.read()
    del read
    found = store.load("k")
    with open("/proc/self/maps") as mapped:
        assert "k.safetensors" not in mapped.read()
    assert found is not None and torch.equal(found["x"], torch.arange(5000.0))


def test_a_damaged_run_counts_as_absent(tmp_path):
    store = RunStore(tmp_path)
    store.save("k", {"x": torch.zeros(10)}, {})
    store.path("k").write_bytes(b"damaged")
    assert store.load("k") is None and not store.path("k").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's mapped files")
def test_no_view_of_a_damaged_run_is_left_when_it_is_removed(tmp_path, monkeypatch):
    """Windows refuses to remove a file while there is one."""
    store, seen = RunStore(tmp_path), []
    store.save("k", {"x": torch.full((5000,), float("nan"))}, {})
    remove = Path.unlink

    def watched(path, **more):
        seen.append(path.name in Path("/proc/self/maps").read_text())
        remove(path, **more)

    monkeypatch.setattr(Path, "unlink", watched)
    assert store.load("k") is None and seen == [False]


def test_headers_survive(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"t": torch.arange(3)}, {"a": {"b": [1, 2.5, "c"]}})
    tensors, header = read_tensors(tmp_path / "x.safetensors", 10_000)
    assert tensors["t"].tolist() == [0, 1, 2] and header == {"a": {"b": [1, 2.5, "c"]}}


def tiny(*shape: int) -> torch.Tensor:
    """So many equal numbers in four bytes of a file."""
    return torch.zeros(1).expand(*shape)


MALFORMED = {
    "a few bytes shown as billions": ({"w": tiny(200_000, 400_000)}, "something other than plain numbers in 'w'"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "something other than plain numbers in 'w'"),
    "meta": ({"w": torch.empty(3, device="meta")}, "something other than plain numbers in 'w'"),
    "not finite": ({"w": torch.tensor([1.0, float("nan")])}, "NaN or infinite numbers in 'w'"),
    "not finite in 8 bits": ({"w": torch.tensor([float("nan")]).to(torch.float8_e5m2)}, "NaN or infinite"),
    "numbers for names": ({3: torch.zeros(2)}, "no table of weights"),
    "a tensor for a table": ({"state_dict": torch.zeros(2)}, "no table of weights"),
    "no tensors": ({"epoch": 3}, "no table of weights"),
    "a list": ([torch.zeros(2)], "no table of weights"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tables_of_others_are_refused(tmp_path, case):
    content, expected = MALFORMED[case]
    torch.save(content, tmp_path / "others.pth")
    with pytest.raises(ValueError, match=expected):
        read_weights(tmp_path / "others.pth", 1 << 20)


def test_tables_of_others_are_read(tmp_path):
    table = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.float8_e4m3fn)}
    for name, content in (("a.pth", {**table, "epoch": 3}), ("b.pt", {"state_dict": table, "epoch": 3})):
        torch.save(content, tmp_path / name)
        found = read_weights(tmp_path / name, 1 << 20)
        assert found.keys() == table.keys() and torch.equal(found["w"], table["w"])
        assert read_weights(tmp_path / name, 1 << 20, lambda names: names[:1]).keys() == {"w"}
    torch.save({"w": table["w"]}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth", 1 << 20)["w"], table["w"])
    with pytest.raises(ValueError, match="bytes, more than the 100"):
        read_weights(tmp_path / "a.pth", 100)


def test_an_embedding_of_a_few_bytes_takes_no_memory(tmp_path):
    torch.save(tiny(20_000, 40_000), tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="something other than plain numbers"):
        load_embedding(tmp_path / "bomb.pt")


@pytest.mark.parametrize("part", [{"losses": [10**400]}, {"method": "x" * 300}])
def test_a_header_that_cannot_be_shown_is_refused(tmp_path, part):
    save_embedding(tmp_path / "a.safetensors", Embedding(embedding().rows, {**embedding().header, **part}))
    with pytest.raises(ValueError, match="damaged header"):
        load_embedding(tmp_path / "a.safetensors")


TEXTUAL_INVERSIONS = {
    "a1111.pt": {"string_to_param": {"*": torch.zeros(2, 768)}, "name": "dog"},
    "sd15.safetensors": {"emb_params": torch.zeros(2, 768)},
    "sdxl.safetensors": {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
}


@pytest.mark.parametrize("name", TEXTUAL_INVERSIONS)
def test_embeddings_of_other_tools_get_the_right_next_step(tmp_path, name):
    path, table = tmp_path / name, TEXTUAL_INVERSIONS[name]
    save_file(table, path) if path.suffix == ".safetensors" else torch.save(table, path)
    with pytest.raises(ValueError, match=f"models/embeddings and write embedding:{path.stem} in the prompt"):
        load_embedding(path)


def test_a_file_is_not_overwritten_where_that_is_not_meant(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.zeros(2)}, {}, replace=False)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_tensors(path, {"x": torch.ones(2)}, {}, replace=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_save_left_is_removed_after_a_day(tmp_path):
    old, of_before, young, others = (
        tmp_path / name
        for name in (
            "likeness-0123456789ab.tmp",
            f"a.safetensors.{'0' * 32}.tmp",
            "likeness-ba9876543210.tmp",
            "model.0123456789ab.tmp",
        )
    )
    for path in (old, of_before, young, others):
        path.write_bytes(b"half")
    for path in (old, of_before, others):
        os.utime(path, (time.time() - 90_000,) * 2)
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", young.name, others.name}


def test_a_long_name_that_a_file_system_takes_is_written(tmp_path):
    path = tmp_path / f"{'x' * 240}.safetensors"
    write_tensors(path, {"x": torch.zeros(2)}, {})
    assert path.is_file()


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_flipped_bit_of_a_stored_run_is_noticed(tmp_path, caplog):
    store, tensors = RunStore(tmp_path), {"fit.losses": torch.rand(3), "kept.000003": torch.rand(4, 5)}
    store.save("key", tensors, {"method": "hiper"})
    size = store.path("key").stat().st_size
    generator = torch.Generator().manual_seed(0)
    for at in [size - 1, *torch.randint(8, size, (60,), generator=generator).tolist()]:
        store.save("key", tensors, {"method": "hiper"})
        flipped(store.path("key"), at)
        run = stored_run(store, "key")
        same = run is not None and run.losses == tensors["fit.losses"].tolist()
        same = same and torch.equal(run.results[3][""], tensors["kept.000003"])
        assert run is None or same, f"byte {at} was read as something else"
    assert "is trained again" in caplog.text


def test_a_run_without_its_losses_counts_as_absent(tmp_path):
    store = RunStore(tmp_path)
    for tensors in ({"kept.000001": torch.zeros(1)}, {"fit.losses": torch.zeros(1), "kept.x": torch.zeros(1)}, {}):
        store.save("key", tensors, {})
        assert stored_run(store, "key") is None


def test_runs_that_can_only_be_read_are_served(tmp_path, monkeypatch):
    store = RunStore(tmp_path)
    store.save("key", {"x": torch.ones(2)}, {})

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "open", refused)  # Path.touch() takes it where the time cannot be set
    monkeypatch.setattr(Path, "unlink", refused)
    found = store.load("key")
    assert found is not None and torch.equal(found["x"], torch.ones(2))
    store.path("key").write_bytes(b"damaged")
    assert store.load("key") is None


def test_a_full_disk_removes_the_oldest_runs_before_it_gives_up(tmp_path, monkeypatch):
    store, room = RunStore(tmp_path), 3
    for key in ("a", "b", "c"):
        store.save(key, {"x": torch.ones(2)}, {})
        os.utime(store.path(key), (1e9 + ord(key),) * 2)

    def usage(folder: Path) -> object:
        used = len(list(Path(folder).glob("*.safetensors")))
        return types.SimpleNamespace(free=1 << 20 if used < room else 0)

    monkeypatch.setattr("shutil.disk_usage", usage)
    store.save("d", {"x": torch.ones(2)}, {})
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"b", "c", "d"}
    room = 0
    with pytest.raises(OSError, match=r"d.safetensors needs 1.2 KB, 0.0 KB are free: make room"):
        store.save("d", {"x": torch.ones(300)}, {})
    assert store.load("d") is not None


def test_only_a_full_disk_costs_other_runs(tmp_path, monkeypatch):
    """A file that another program holds, or missing rights, must not empty the store."""
    store = RunStore(tmp_path)
    for key in ("a", "b"):
        store.save(key, {"x": torch.ones(2)}, {})

    def refused(*_: object) -> None:
        raise PermissionError(13, "held by another process")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        store.save("c", {"x": torch.ones(2)}, {})
    with pytest.raises(PermissionError):
        write_tensors(tmp_path / "new.safetensors", {"x": torch.ones(2)}, {}, replace=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_run_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    store = RunStore(tmp_path)
    store.save("key", {"x": torch.ones(2)}, {})

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("likeness.core.fit.runs.read_tensors", refused)
        assert store.load("key") is None
    assert store.load("key") is not None
