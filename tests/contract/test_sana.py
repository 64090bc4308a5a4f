"""Sana of a diffusers folder as ComfyUI's own MODEL, CLIP and VAE, against diffusers' own pipeline."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from .. import tiny_sana
from .sana import PROMPT, encoded, levels, pictured, reference


def test_the_picture_is_the_one_of_diffusers_pipeline(sana, sana_prompts, sana_pipeline):
    wanted, sigmas = reference(sana_pipeline)
    assert wanted.std() > 0.02
    torch.testing.assert_close(pictured(sana.model, sana.vae, sana_prompts, sigmas), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "instructed", "rows"),
    [
        (PROMPT, True, None),
        (PROMPT, False, None),
        ("word " * 120, True, 300),
        ("word " * 120, False, 300),
        ("", False, 1),
    ],
)
def test_the_rows_of_a_prompt_are_the_visible_ones_of_the_pipeline(sana, sana_pipeline, text, instructed, rows):
    clip = sana.clip if instructed else sana.plain_clip
    instruction = pipeline_instruction() if instructed else None
    with torch.inference_mode():
        wanted, mask, _, _ = sana_pipeline.encode_prompt(text, False, complex_human_instruction=instruction)
    found = encoded(clip, text)[0][0]
    assert found.shape[1] == int(mask.sum()) and rows in (None, found.shape[1])
    torch.testing.assert_close(found.cpu(), wanted[mask.bool()][None].float(), atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_has_no_instruction(sana):
    assert torch.equal(encoded(sana.clip, "")[0][0], encoded(sana.plain_clip, "")[0][0])


def pipeline_instruction() -> list[str]:
    import inspect

    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def test_without_the_instruction_a_prompt_has_other_rows(sana, sana_folder):
    from likeness.core.sana.host.sana import load_sana

    with torch.inference_mode():
        _, other, *_ = load_sana(sana_folder, instruction=False)
    plain, bare = encoded(sana.plain_clip, PROMPT)[0][0], encoded(other, PROMPT)[0][0]
    assert torch.equal(plain, bare)
    full = encoded(sana.clip, PROMPT)[0][0]
    assert full.shape[1] == plain.shape[1] + 1 and float((full[:, -1] - plain[:, -1]).abs().max()) > 1e-3


def test_a_picture_is_encoded_as_by_diffusers(sana, sana_pipeline):
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = sana.vae.encode(picture)
        wanted = sana_pipeline.vae.encode(picture.movedim(-1, 1) * 2 - 1).latent
        back = sana.vae.decode(found)
    assert found.shape == (1, tiny_sana.CHANNELS, 2, 3) and back.shape == picture.shape
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    in_model = sana.model.model.process_latent_in(found)
    torch.testing.assert_close(in_model, found * tiny_sana.SCALE)


@pytest.mark.parametrize(("scheduler", "shift"), [({"flow_shift": 2.5}, 2.5), ({"shift": 4}, 4.0), ({}, 3.0)])
def test_the_noise_levels_are_shifted_as_the_folder_says(sana_folder, tmp_path, scheduler, shift):
    import json

    from likeness.core.sana.host.sana import load_model

    copy = shutil.copytree(sana_folder, tmp_path / "copy")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = float(load_model(copy, "fp32").get_model_object("model_sampling").sigma(torch.tensor(500.0)))
    assert found == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_its_precision_can_be_chosen(sana_folder, name):
    from likeness.core.sana.host.sana import DTYPES, load_model

    with torch.inference_mode():
        model = load_model(sana_folder, name)
    assert {value.dtype for value in model.model.diffusion_model.parameters()} == {DTYPES[name]}
    assert model.model_dtype() == DTYPES[name]


def test_the_memory_that_is_asked_for_is_about_what_a_gradient_keeps(sana, sana_prompts):
    """Four times the estimate for one pass, as the session asks for; counted with autograd's own hooks."""
    network = sana.model.model.diffusion_model
    own = {value.untyped_storage().data_ptr() for value in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = value
        return value

    with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        x = torch.randn(1, tiny_sana.CHANNELS, 16, 16, requires_grad=True)
        network(x, torch.tensor([500.0]), sana_prompts[0][0][0].clone())
    counted = sum(value.untyped_storage().nbytes() for value in kept.values())
    asked = sana.model.model.memory_required(list(x.shape))
    assert 0.5 * asked < counted / 4 < 2 * asked


def test_it_can_be_read_once_more(sana, sana_prompts):
    """As newer ComfyUI does for a copy of its own."""
    read, arguments = sana.model.cached_patcher_init
    with torch.inference_mode():
        again = read(*arguments, disable_dynamic=True)
    assert again.model is not sana.model.model
    pictures = [pictured(model, sana.vae, sana_prompts, levels(sana.model)) for model in (sana.model, again)]
    assert torch.equal(*pictures)


def test_it_is_loaded_whole_and_unloaded_whole(sana):
    import comfy.model_management as mm

    mm.load_models_gpu([sana.model], memory_required=0)
    assert not sana.model.model.model_lowvram
    assert sana.model.partially_unload(torch.device("cpu"), 1) == 0
    assert type(sana.model.clone()) is type(sana.model)


def without(part: str):
    return lambda copy: shutil.rmtree(copy / part)


def pickled(copy: Path) -> None:
    file = next((copy / "vae").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def cut(copy: Path) -> None:
    file = next((copy / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])


def lacking(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next((copy / "transformer").glob("*.safetensors"))
    tensors = load_file(str(file))
    tensors.pop("transformer_blocks.0.attn1.to_q.weight")
    save_file(tensors, str(file), {"format": "pt"})


def changed(path: str, **entries):
    return lambda copy: tiny_sana.edit(copy / path, **entries)


def torn(copy: Path) -> None:
    (copy / "vae" / "config.json").write_text("{")


def no_words(copy: Path) -> None:
    for file in (copy / "tokenizer").glob("*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("text_encoder"), "has no folder text_encoder"),
        (pickled, "a pickle, which can run code"),
        (cut, "could not be loaded by diffusers"),
        (lacking, "lack 1 tensors"),
        (torn, "cannot be read"),
        (changed("vae/config.json", scaling_factor=None), "lacks an entry"),
        (changed("vae/config.json", latent_channels=0), "has a wrong one"),
        (changed("vae/config.json", scaling_factor=float("nan")), "it holds the number NaN"),
        (changed("vae/config.json", scaling_factor=10**400), "it holds the number 1000"),
        (changed("tokenizer/tokenizer_config.json", model_max_length=[]), "okenizer"),
        (no_words, "folder tokenizer lacks what prepares images and words"),
        (changed("model_index.json", _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline, expected a"),
        (changed("vae/config.json", _class_name="AutoencoderKL"), "AutoencoderKL, expected AutoencoderDC"),
        (changed("transformer/config.json", guidance_embeds=True), "Sana-Sprint"),
    ],
)
def test_a_folder_that_is_no_use_is_refused_with_a_reason(sana_folder, tmp_path, damage, said):
    from likeness.core.sana.host.sana import load_sana

    copy = shutil.copytree(sana_folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(ValueError, match=said):
        load_sana(copy)


def test_weights_of_another_precision_are_found(sana_folder, tmp_path):
    from likeness.core.sana.host.sana import load_sana

    copy = shutil.copytree(sana_folder, tmp_path / "copy")
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (copy / part / f"{name}.safetensors").rename(copy / part / f"{name}.fp16.safetensors")
    with torch.inference_mode():
        assert load_sana(copy)[2].latent_channels == tiny_sana.CHANNELS


def test_without_diffusers_it_is_said_how_to_install_it(sana_folder, monkeypatch):
    from likeness.core.sana.host.sana import load_sana

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match="pip install -U diffusers"):
        load_sana(sana_folder)


def test_only_folders_of_sana_below_the_models_folder_are_offered(sana_folder, tmp_path, monkeypatch):
    import folder_paths

    from likeness.core.sana.host.sana import sana_names
    from likeness.core.session import folders

    root = tmp_path / "diffusers"
    shutil.copytree(sana_folder, root / "sana")
    shutil.copytree(sana_folder, root / "other")
    tiny_sana.edit(root / "other" / "model_index.json", _class_name="FluxPipeline")
    (root / "linked").symlink_to(sana_folder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    assert sana_names() == ["linked", "sana"]
    for hostile in ("../sana", str(root / "sana"), "sana\0", "C:/sana"):
        with pytest.raises((ValueError, FileNotFoundError)):
            folders.resolve(folders.DIFFUSERS, hostile)
    before = folders.state(folders.DIFFUSERS, "sana")
    tiny_sana.edit(root / "sana" / "vae" / "config.json", scaling_factor=1.0)
    assert folders.state(folders.DIFFUSERS, "sana") != before


def test_loading_leaves_the_global_random_numbers_alone(sana_folder):
    from likeness.core.sana.host.sana import load_sana

    before = torch.random.get_rng_state()
    with torch.inference_mode():
        load_sana(sana_folder)
    assert torch.equal(before, torch.random.get_rng_state())
