"""Names of saved files: what is written is what the loaders list, and nothing is overwritten."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from likeness.core.files import write_tensors
from likeness.core.session.outputs import check_prefix, numbered_path, prefix_answer, save_numbered

REFUSED = [
    *("", "/", "a/../b", "..", "/etc/x", "\\\\server\\x", "C:\\x", "C:x", "x:stream", "%date:C:%", "x%date:s"),
    *(".hidden/x", "a/.x", "~/x", "~name", "a\0b", "a\nb", "a /b", "a./b", "\ud800"),
    *("x" * 201, "\u00e9" * 150, "\U0001f415" * 70, f"{'x' * 201}/a", "/".join(["x" * 100] * 6)),
]
TAKEN = [
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "likeness/subject",
    "a\\b",
    "dog %date:yyyy-MM-dd%",
    "\u72d7",
    "x" * 200,
    "\u00e9" * 100,
    "a.b",
    "a~b",
]


@pytest.mark.parametrize("prefix", REFUSED, ids=ascii)
def test_names_are_refused_before_work_starts(tmp_path, prefix):
    answer = prefix_answer(prefix)
    assert isinstance(answer, str) and "is not a plain name" in answer and answer.isascii()
    with pytest.raises(ValueError, match="is not a plain name"):
        numbered_path(str(tmp_path / "models"), prefix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", TAKEN, ids=ascii)
def test_what_is_written_is_what_is_listed(tmp_path, monkeypatch, prefix):
    import folder_paths

    from likeness.core.session import folders

    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.EMBEDDINGS.folder, ([str(tmp_path)], set()))
    path = save_numbered(str(tmp_path), prefix, lambda path: write_tensors(path, {"x": torch.zeros(1)}, {}))
    name = folders.listed_name(folders.EMBEDDINGS, path)
    assert folders.names(folders.EMBEDDINGS) == [name] and folders.resolve(folders.EMBEDDINGS, name).samefile(path)


def test_a_name_that_comes_by_a_link_is_checked_when_it_is_there():
    assert prefix_answer(None) is True and check_prefix("a\\b") == ("a", "b")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written .*: allow it, or"):
        numbered_path(str(tmp_path / "models"), "x")


def test_names_that_windows_keeps_for_itself_are_refused_there(monkeypatch):
    names = ("con", "a/NUL", "com1.x/a", "Aux.dog")
    assert [check_prefix(name) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr("likeness.core.session.outputs.os.name", "nt")
        answers = [prefix_answer(name) for name in names]
    assert all("is not a plain name" in str(answer) for answer in answers)


def test_a_disk_that_does_not_tell_upper_from_lower_case_loses_no_file(tmp_path):
    (tmp_path / "Dog_00001_.safetensors").touch()

    def save(path: Path) -> None:
        if path.name.lower() in [each.name.lower() for each in tmp_path.iterdir()]:
            raise FileExistsError(path)
        path.touch()

    assert save_numbered(str(tmp_path), "dog", save).name == "dog_00002_.safetensors"


def test_two_that_save_at_once_lose_no_file(tmp_path):
    """Each takes the next free number when the other one was faster."""
    paths: list[Path] = []

    def save(value: int) -> None:
        def write(path: Path) -> None:
            write_tensors(path, {"x": torch.full((2,), float(value))}, {}, replace=False)

        paths.append(save_numbered(str(tmp_path), "subject", write))

    for start in range(0, 24, 8):
        threads = [threading.Thread(target=save, args=(start + index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(paths)) == len(paths) == 24 == len(list(tmp_path.iterdir()))
