"""Model folders: what is listed, what is found, and names that try to leave."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
import pytest

from likeness.core.session import folders
from likeness.core.session.folders import EMBEDDINGS, LPIPS, VISION
from likeness.core.vision.host.extras.caption import is_captioner
from likeness.core.vision.host.extras.grounding import is_detector
from likeness.core.vision.host.vision import vision_names


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """All kinds below a folder of this test; returns that folder."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for kind in folders.KINDS:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind.folder, ([str(tmp_path / kind.folder)], set()))
        (tmp_path / kind.folder).mkdir()
    return tmp_path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_registering_again_changes_nothing():
    folders.register_folders()
    before = {kind.folder: folders.roots(kind) for kind in folders.KINDS}
    folders.register_folders()
    assert before == {kind.folder: folders.roots(kind) for kind in folders.KINDS}


def test_lists_folders_and_files_but_not_their_parts(root):
    vision = root / VISION.folder
    for name in ("dino/config.json", "dino/model.safetensors", "mine/ViT-B-32__a.safetensors", "notes.txt", "old.bin"):
        touch(vision / name)
    touch(vision / ".hidden" / "config.json")
    assert folders.names(VISION) == ["dino", "mine/ViT-B-32__a.safetensors"]
    assert folders.resolve(VISION, "dino") == (vision / "dino").resolve()


def test_lpips_lists_heads_and_not_backbones(root):
    for name in ("alex.pth", "vgg.safetensors", "alexnet-owt-7be5be79.pth", "VGG16-397923af.pth"):
        touch(root / LPIPS.folder / name)
    assert folders.names(LPIPS) == ["alex.pth", "vgg.safetensors"]


def test_second_folder_is_searched_too(root, tmp_path_factory):
    more = tmp_path_factory.mktemp("more")
    touch(more / "a" / "cat.pt")
    folder_paths.add_model_folder_path(EMBEDDINGS.folder, str(more))
    assert folders.names(EMBEDDINGS) == ["a/cat.pt"]
    assert folders.resolve(EMBEDDINGS, "a/cat.pt") == (more / "a" / "cat.pt").resolve()
    assert folders.roots(EMBEDDINGS)[0] == str(root / EMBEDDINGS.folder)


def test_an_odd_folder_hides_nothing_else(root, tmp_path_factory):
    """Neither a name that resolve() refuses nor an empty folder in front of the real one; the lists are made while
    ComfyUI starts."""
    more = tmp_path_factory.mktemp("more")
    for path in (root / VISION.folder / "~dino" / "config.json", more / "dino" / "config.json"):
        touch(path)
    (root / VISION.folder / "dino").mkdir()
    folder_paths.add_model_folder_path(VISION.folder, str(more))
    assert folders.names(VISION) == ["dino"] and vision_names() == ["dino"]
    assert vision_names(is_detector) == vision_names(is_captioner) == []
    assert folders.resolve(VISION, "dino") == (more / "dino").resolve()


def test_listed_name_and_resolve_are_inverse(root):
    path = touch(root / EMBEDDINGS.folder / "likeness" / "cat_00001_.safetensors")
    name = folders.listed_name(EMBEDDINGS, path)
    assert name == "likeness/cat_00001_.safetensors" and folders.resolve(EMBEDDINGS, name) == path.resolve()
    with pytest.raises(ValueError, match="does not lie in"):
        folders.listed_name(EMBEDDINGS, touch(root / "elsewhere.safetensors"))


HOSTILE = [
    "../secret.safetensors",
    "a/../../secret.safetensors",
    "..\\secret.safetensors",
    "/etc/passwd",
    "\\\\server\\share\\x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "~/x.safetensors",
    "a\0.safetensors",
    "",
    ".",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(root, name):
    touch(root / "secret.safetensors")
    with pytest.raises(ValueError, match="not a plain name"):
        folders.resolve(EMBEDDINGS, name)


def test_absolute_path_inside_is_refused_too(root):
    with pytest.raises(ValueError, match="not a plain name"):
        folders.resolve(EMBEDDINGS, str(touch(root / EMBEDDINGS.folder / "a.safetensors")))


def test_links_of_the_owner_are_followed(root, tmp_path_factory):
    """As ComfyUI's own loaders do: many keep their models on another disk."""
    disk = tmp_path_factory.mktemp("disk")
    for name in ("4f2a", "shared/b.safetensors", "dino/config.json"):
        touch(disk / name)
    os.symlink(disk / "4f2a", root / EMBEDDINGS.folder / "link.safetensors")
    os.symlink(disk / "shared", root / EMBEDDINGS.folder / "shared")
    os.symlink(disk / "dino", root / VISION.folder / "dino")
    assert folders.names(EMBEDDINGS) == ["link.safetensors", "shared/b.safetensors"]
    path = folders.resolve(EMBEDDINGS, "link.safetensors")
    assert path.suffix == ".safetensors" and path.read_bytes() == b"x"
    assert folders.resolve(EMBEDDINGS, "shared/b.safetensors").is_file()
    assert folders.names(VISION) == ["dino"] and folders.resolve(VISION, "dino").is_dir()
    with pytest.raises(ValueError, match="not a plain name"):
        folders.resolve(EMBEDDINGS, "shared/../../4f2a")


def test_a_link_that_leads_nowhere_is_said(root):
    os.symlink(root / "gone", root / EMBEDDINGS.folder / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no 'a.safetensors'"):
        folders.resolve(EMBEDDINGS, "a.safetensors")


def test_what_cannot_be_read_prevents_no_list(root):
    """The lists are made while ComfyUI loads the pack."""
    folder = root / VISION.folder
    os.symlink(root / "gone", folder / "broken.safetensors")
    os.symlink(folder / "loop.safetensors", folder / "loop.safetensors")
    (folder / "a folder.safetensors").mkdir()
    os.symlink(root / "gone", touch(folder / "half/other.json").with_name("config.json"))
    touch(folder / "odd/config.json").write_bytes(b"\xff")
    touch(folder / "clip.safetensors")
    assert vision_names() == ["clip.safetensors", "odd"]
    assert vision_names(is_detector) == vision_names(is_captioner) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_no_file_and_is_never_waited_for(root):
    os.mkfifo(root / VISION.folder / "a.safetensors")
    assert vision_names() == []
    with pytest.raises(ValueError, match="'a.safetensors' .* was given, but a .safetensors file"):
        folders.resolve(VISION, "a.safetensors")


def test_linked_model_folder_works(root, tmp_path_factory, monkeypatch):
    real = tmp_path_factory.mktemp("real")
    path = touch(real / "a.safetensors")
    os.symlink(real, root / "linked")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, EMBEDDINGS.folder, ([str(root / "linked")], set()))
    assert folders.names(EMBEDDINGS) == ["a.safetensors"] == [folders.listed_name(EMBEDDINGS, path)]
    assert folders.resolve(EMBEDDINGS, "a.safetensors").samefile(path)


def test_other_kinds_and_missing_names_are_said(root):
    touch(root / VISION.folder / "weights.bin")
    (root / VISION.folder / "empty").mkdir()
    for name in ("weights.bin", "empty"):
        with pytest.raises(ValueError, match="is expected"):
            folders.resolve(VISION, name)
    with pytest.raises(FileNotFoundError, match="There is no 'gone.safetensors'"):
        folders.resolve(VISION, "gone.safetensors")


def test_a_missing_model_of_the_shipped_graphs_is_said_with_its_address(root):
    from likeness.toyworld import workflows

    notes = " ".join(path.read_text(encoding="utf-8") for path in workflows.WORKFLOWS.glob("*.json"))
    assert not [name for name, source in folders.SOURCES.items() if f"{source.split()[0]})" not in notes]
    with pytest.raises(
        FileNotFoundError, match="download its files from https://huggingface.co/facebook/dinov2-large "
    ):
        folders.resolve(VISION, "dinov2-large")
