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


@pytest.fixture(scope="module")
def sana_folder():
    """A tiny diffusers folder of Sana."""
    from .. import tiny_sana

    return tiny_sana.folder()


@pytest.fixture(scope="module")
def sana(sana_folder):
    """Loaded by the pack."""
    from types import SimpleNamespace

    import torch

    from likeness.core.sana.host.sana import load_sana

    with torch.inference_mode():  # as a node does
        model, clip, vae, plain = load_sana(sana_folder)
    return SimpleNamespace(model=model, clip=clip, vae=vae, plain_clip=plain)


@pytest.fixture
def sana_pipeline(sana_folder):
    """Loaded by diffusers."""
    import torch
    from diffusers import SanaPipeline

    with torch.inference_mode(False):
        found = SanaPipeline.from_pretrained(str(sana_folder), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def sana_prompts(sana):
    """Positive and negative."""
    from .sana import NEGATIVE, PROMPT, encoded

    return encoded(sana.clip, PROMPT), encoded(sana.clip, NEGATIVE)
