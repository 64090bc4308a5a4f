"""Which ComfyUI and which Python the tools take."""

from __future__ import annotations

from pathlib import Path

import pytest

from likeness.toolbox import environment


def comfyui_in(folder: Path, venv: Path) -> Path:
    """A ComfyUI as far as the set-up looks at it, and a virtual environment."""
    for file in (folder / "main.py", environment.python_in(venv)):
        file.parent.mkdir(parents=True)
        file.touch()
    return folder


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "project" / ".sandbox"
    monkeypatch.setattr(environment, "SANDBOX", folder)
    monkeypatch.setattr(environment, "PYTHON", environment.python_in(folder / "venv"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return folder


def test_the_sandboxs_own_comfyui_is_not_foreign_when_it_is_named(sandbox, tmp_path, monkeypatch):
    """Else the sandbox's Python would count as a foreign ComfyUI's, and be removed to be built on top of itself."""
    own = comfyui_in(sandbox / "comfyui", sandbox / "venv")
    assert environment.chosen_comfyui() == (own, None)
    link = tmp_path / "worktree"
    link.symlink_to(sandbox, target_is_directory=True)
    monkeypatch.chdir(sandbox.parent)
    for path in (own, f"{own}/", ".sandbox/comfyui", link / "comfyui"):
        monkeypatch.setenv("COMFYUI_PATH", str(path))
        assert environment.chosen_comfyui() == (own, None)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_in(sandbox / "older", tmp_path / "other")))
    assert environment.chosen_comfyui() == (sandbox / "older", None)


@pytest.mark.parametrize("venv", ["ComfyUI/venv", "ComfyUI/.venv", "venv"])
def test_a_foreign_comfyui_keeps_its_python(sandbox, tmp_path, monkeypatch, venv):
    comfyui = comfyui_in(tmp_path / "ComfyUI", tmp_path / venv)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert environment.chosen_comfyui() == (comfyui, environment.python_in(tmp_path / venv))


def test_a_folder_without_comfyui_is_refused(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no main\.py"):
        environment.chosen_comfyui()


def test_a_link_to_a_checkout_that_has_moved_is_replaced(tmp_path):
    from likeness.toolbox.server import link_or_copy

    target, here = tmp_path / "link", tmp_path / "here"
    here.mkdir()
    target.symlink_to(tmp_path / "gone")
    link_or_copy(here, target)
    assert target.resolve() == here.resolve()
    link_or_copy(here, target)
    assert target.is_dir()
