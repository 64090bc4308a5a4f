"""These tests need ComfyUI's modules in the process."""

import pytest

from .. import inprocess

inprocess.start()


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """Stored runs, results and LoRAs of this test alone."""
    import folder_paths

    folder_paths.set_user_directory(str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})


@pytest.fixture(scope="module")
def clip():
    """A text encoder, small and random."""
    from .. import tiny_models

    return tiny_models.clip_l()
