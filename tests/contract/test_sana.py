"""Sana of a diffusers folder as ComfyUI's own MODEL, CLIP and VAE, against diffusers' own pipeline."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from .. import tiny_sana
from ..unit.vision.models import clip_folder
from .test_contract import forget_runs

PROMPT, NEGATIVE = "A photo of a Dog ", ""
STEPS, CFG, SEED = 4, 4.5, 3
SHAPE = (1, tiny_sana.CHANNELS, 2, 4)  # of a picture of 128 x 64
LIMIT = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sana.write(tmp_path_factory.mktemp("diffusers") / "sana")


@pytest.fixture(scope="module")
def loaded(folder):
    from likeness.core.host.sana import load_sana

    with torch.inference_mode():  # as a node does
        return load_sana(folder)


@pytest.fixture
def pipeline(folder):
    from diffusers import SanaPipeline

    with torch.inference_mode(False):
        found = SanaPipeline.from_pretrained(str(folder), local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def encoded(clip, text: str) -> list:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.fixture(scope="module")
def prompts(loaded):
    """Positive and negative."""
    return encoded(loaded.clip, PROMPT), encoded(loaded.clip, NEGATIVE)


def noise() -> torch.Tensor:
    """What ComfyUI draws for the seed."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))


def reference(pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture [1, H, W, 3] of diffusers' pipeline, and the noise levels that it took."""
    picture = pipeline(
        PROMPT,
        NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        height=SHAPE[2] * 32,
        width=SHAPE[3] * 32,
        latents=noise(),
        output_type="pt",
        use_resolution_binning=False,
    ).images
    return picture.movedim(1, -1), pipeline.scheduler.sigmas.clone()


def empty() -> torch.Tensor:
    """As the stock node for samples that are 32 times smaller than the picture makes it."""
    from comfy_extras.nodes_hunyuan import EmptyHunyuanImageLatent

    return EmptyHunyuanImageLatent.execute(SHAPE[3] * 32, SHAPE[2] * 32, 1).result[0]["samples"]


def levels(model, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def pictured(model, vae, prompts, sigmas) -> torch.Tensor:
    """What stock sampling and decoding make."""
    import comfy.sample
    import comfy.samplers

    with torch.inference_mode():
        latent = comfy.sample.fix_empty_latent_channels(model, empty())
        given = comfy.sample.prepare_noise(latent, SEED)
        sampler = comfy.samplers.sampler_object("euler")
        samples = comfy.sample.sample_custom(
            model, given, CFG, sampler, sigmas, *prompts, latent, disable_pbar=True, seed=SEED
        )
        return vae.decode(samples).cpu()


def test_the_picture_is_the_one_of_diffusers_pipeline(loaded, prompts, pipeline):
    wanted, sigmas = reference(pipeline)
    assert wanted.std() > 0.02
    torch.testing.assert_close(pictured(loaded.model, loaded.vae, prompts, sigmas), wanted, atol=1e-4, rtol=0)


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
def test_the_rows_of_a_prompt_are_the_visible_ones_of_the_pipeline(loaded, pipeline, text, instructed, rows):
    clip = loaded.clip if instructed else loaded.plain_clip
    instruction = pipeline_instruction() if instructed else None
    with torch.inference_mode():
        wanted, mask, _, _ = pipeline.encode_prompt(text, False, complex_human_instruction=instruction)
    found = encoded(clip, text)[0][0]
    assert found.shape[1] == int(mask.sum()) and rows in (None, found.shape[1])
    torch.testing.assert_close(found.cpu(), wanted[mask.bool()][None].float(), atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_has_no_instruction(loaded):
    assert torch.equal(encoded(loaded.clip, "")[0][0], encoded(loaded.plain_clip, "")[0][0])


def pipeline_instruction() -> list[str]:
    import inspect

    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def test_without_the_instruction_a_prompt_has_other_rows(loaded, folder):
    from likeness.core.host.sana import load_sana

    with torch.inference_mode():
        other = load_sana(folder, instruction=False)
    plain, bare = encoded(loaded.plain_clip, PROMPT)[0][0], encoded(other.clip, PROMPT)[0][0]
    assert torch.equal(plain, bare)
    full = encoded(loaded.clip, PROMPT)[0][0]
    assert full.shape[1] == plain.shape[1] + 1 and float((full[:, -1] - plain[:, -1]).abs().max()) > 1e-3


def test_a_picture_is_encoded_as_by_diffusers(loaded, pipeline):
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = loaded.vae.encode(picture)
        wanted = pipeline.vae.encode(picture.movedim(-1, 1) * 2 - 1).latent
        back = loaded.vae.decode(found)
    assert found.shape == (1, tiny_sana.CHANNELS, 2, 3) and back.shape == picture.shape
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    in_model = loaded.model.model.process_latent_in(found)
    torch.testing.assert_close(in_model, found * tiny_sana.SCALE)


@pytest.mark.parametrize(("scheduler", "shift"), [({"flow_shift": 2.5}, 2.5), ({"shift": 4}, 4.0), ({}, 3.0)])
def test_the_noise_levels_are_shifted_as_the_folder_says(folder, tmp_path, scheduler, shift):
    import json

    from likeness.core.host.sana import load_model

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    found = float(load_model(copy, "fp32").get_model_object("model_sampling").sigma(torch.tensor(500.0)))
    assert found == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_its_precision_can_be_chosen(folder, name):
    from likeness.core.host.sana import DTYPES, load_model

    with torch.inference_mode():
        model = load_model(folder, name)
    assert {value.dtype for value in model.model.diffusion_model.parameters()} == {DTYPES[name]}
    assert model.model_dtype() == DTYPES[name]


def test_the_memory_that_is_asked_for_is_about_what_a_gradient_keeps(loaded, prompts):
    """Four times the estimate for one pass, as the session asks for; counted with autograd's own hooks."""
    network = loaded.model.model.diffusion_model
    own = {value.untyped_storage().data_ptr() for value in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = value
        return value

    with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        x = torch.randn(1, tiny_sana.CHANNELS, 16, 16, requires_grad=True)
        network(x, torch.tensor([500.0]), prompts[0][0][0].clone())
    counted = sum(value.untyped_storage().nbytes() for value in kept.values())
    asked = loaded.model.model.memory_required(list(x.shape))
    assert 0.5 * asked < counted / 4 < 2 * asked


def test_it_can_be_read_once_more(loaded, prompts):
    """As newer ComfyUI does for a copy of its own."""
    read, arguments = loaded.model.cached_patcher_init
    with torch.inference_mode():
        again = read(*arguments, disable_dynamic=True)
    assert again.model is not loaded.model.model
    pictures = [pictured(model, loaded.vae, prompts, levels(loaded.model)) for model in (loaded.model, again)]
    assert torch.equal(*pictures)


def test_it_is_loaded_whole_and_unloaded_whole(loaded):
    import comfy.model_management as mm

    mm.load_models_gpu([loaded.model], memory_required=0)
    assert not loaded.model.model.model_lowvram
    assert loaded.model.partially_unload(torch.device("cpu"), 1) == 0
    assert type(loaded.model.clone()) is type(loaded.model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("what", ["conditioning", "latent", "lora"])
def test_gradients_through_the_model(loaded, prompts, what, checkpointing):
    from likeness.core.host import selftest

    with torch.inference_mode():
        latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        check = getattr(selftest, f"check_{what}")
        found = check(loaded.model, prompts[0], latent, checkpointing=checkpointing)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_through_the_autoencoder(loaded, checkpointing):
    from likeness.core.host import selftest

    with torch.inference_mode():
        latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        found = selftest.check_vae_decode(loaded.vae, latent, checkpointing=checkpointing)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny CLIP."""
    from likeness.core.host.vision import load_vision

    where = tmp_path_factory.mktemp("vision") / "clip"
    clip_folder(where)
    with torch.inference_mode():
        return load_vision(where)


def optimised(loaded, prompts, vision, clip=None, **changes):
    from likeness.core.host.likeness_optimisation import Generator, Plan, Sampling, optimise_lora
    from likeness.core.host.similarity import Part, Similarity
    from likeness.core.siso import SisoSettings

    found = {"iterations": 6, "checkpointing": False, "rate": 0.02, **changes}
    coarse = torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(6))
    subject = torch.nn.functional.interpolate(coarse, size=(64, 128), mode="bilinear").movedim(1, -1)
    sampling = Sampling(empty(), levels(loaded.model), SEED, CFG, 3)
    with torch.inference_mode():
        return optimise_lora(
            Generator(loaded.model, loaded.vae, *prompts, clip, PROMPT),
            Similarity((Part(vision, 1.0, subject),)),
            sampling,
            Plan(found["iterations"], 2, "best", found["checkpointing"]),
            SisoSettings(found["rate"], 1e-4, 0.0, 0.0, patience=0),
        )


@pytest.fixture(scope="module")
def learned(loaded, prompts, vision, tmp_path_factory):
    """An optimisation, with the pictures of the model as it is before and after."""
    import folder_paths

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path_factory.mktemp("user")))
    try:
        yield Learned(loaded, prompts, vision)
    finally:
        folder_paths.set_user_directory(before)


class Learned:
    """A LoRA of Sana, and the picture without it before and after."""

    def __init__(self, loaded, prompts, vision) -> None:
        self.before = pictured(loaded.model, loaded.vae, prompts, levels(loaded.model))
        weights = dict(loaded.model.model.named_parameters())
        self.found = optimised(loaded, prompts, vision, iterations=12)
        self.after = pictured(loaded.model, loaded.vae, prompts, levels(loaded.model))
        self.same = all(value is weights[name] for name, value in loaded.model.model.named_parameters())


def test_the_pictures_become_more_alike_and_the_model_stays_as_it_is(learned):
    assert learned.found.losses[learned.found.best] < learned.found.losses[0] - 1e-3
    assert torch.equal(learned.before, learned.after) and learned.same
    assert float((learned.before - learned.found.pictures[:1]).abs().max()) < 1 / 254


def test_the_lora_in_stock_nodes_makes_the_kept_picture(loaded, prompts, learned, caplog):
    import comfy.sd

    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        tuned, _ = comfy.sd.load_lora_for_models(loaded.model, None, learned.found.lora, 1.0, 0.0)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage().lower()]
    blocks, both, projections = 2, 2, 3
    assert len(tuned.patches) == blocks * both * projections == len(learned.found.lora) // 2
    again = pictured(tuned, loaded.vae, prompts, levels(loaded.model))
    torch.testing.assert_close(again, learned.found.picture, atol=1e-4, rtol=0)
    assert float((again - learned.before).abs().max()) > 1e-3


def test_the_lora_in_diffusers_makes_the_kept_picture(loaded, prompts, learned, pipeline, tmp_path):
    from safetensors.torch import save_file

    save_file(learned.found.lora, str(tmp_path / "subject.safetensors"))
    with torch.inference_mode(False):
        pipeline.load_lora_weights(str(tmp_path), weight_name="subject.safetensors")
    wanted, sigmas = reference(pipeline)
    import comfy.sd

    with torch.inference_mode():
        tuned, _ = comfy.sd.load_lora_for_models(loaded.model, None, learned.found.lora, 1.0, 0.0)
    found = pictured(tuned, loaded.vae, prompts, sigmas)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert float((pictured(loaded.model, loaded.vae, prompts, sigmas) - wanted).abs().max()) > 1e-3


def test_checkpointing_changes_nothing(loaded, prompts, vision, own_folders, tmp_path):
    plain = optimised(loaded, prompts, vision, iterations=4)
    forget_runs(tmp_path)
    found = optimised(loaded, prompts, vision, iterations=4, checkpointing=True)
    assert found.losses == pytest.approx(plain.losses, abs=1e-5) and found.losses[0] != found.losses[-1]


def test_stopped_early_it_goes_on_as_if_it_had_not_been(loaded, prompts, vision, own_folders, tmp_path):
    whole = optimised(loaded, prompts, vision, iterations=5)
    forget_runs(tmp_path)
    first = optimised(loaded, prompts, vision, iterations=2)
    again = optimised(loaded, prompts, vision, iterations=5)
    assert first.losses == whole.losses[:2] and again.losses == whole.losses
    assert all(torch.equal(again.lora[name], value) for name, value in whole.lora.items())


def test_its_text_encoder_is_not_trained(loaded, prompts, vision):
    with pytest.raises(ValueError, match="disconnect 'clip'"):
        optimised(loaded, prompts, vision, clip=loaded.clip)


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
        (no_words, "tokenizer of copy could not be loaded"),
        (changed("model_index.json", _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline, expected is"),
        (changed("vae/config.json", _class_name="AutoencoderKL"), "AutoencoderKL, expected is AutoencoderDC"),
        (changed("transformer/config.json", guidance_embeds=True), "Sana-Sprint"),
    ],
)
def test_a_folder_that_is_no_use_is_refused_with_a_reason(folder, tmp_path, damage, said):
    from likeness.core.host.sana import load_sana

    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(ValueError, match=said):
        load_sana(copy)


def test_weights_of_another_precision_are_found(folder, tmp_path):
    from likeness.core.host.sana import load_sana

    copy = shutil.copytree(folder, tmp_path / "copy")
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (copy / part / f"{name}.safetensors").rename(copy / part / f"{name}.fp16.safetensors")
    with torch.inference_mode():
        assert load_sana(copy).vae.latent_channels == tiny_sana.CHANNELS


def test_without_diffusers_it_is_said_how_to_install_it(folder, monkeypatch):
    from likeness.core.host.sana import load_sana

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match="pip install -U diffusers"):
        load_sana(folder)


def test_only_folders_of_sana_below_the_models_folder_are_offered(folder, tmp_path, monkeypatch):
    import folder_paths

    from likeness.core.host import folders
    from likeness.core.host.sana import sana_names, sana_state

    root = tmp_path / "diffusers"
    shutil.copytree(folder, root / "sana")
    shutil.copytree(folder, root / "other")
    tiny_sana.edit(root / "other" / "model_index.json", _class_name="FluxPipeline")
    (root / "linked").symlink_to(folder)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(root)], {"folder"}))
    assert sana_names() == ["sana"]
    for hostile in ("../sana", str(root / "sana"), "linked", "sana\0", "C:/sana"):
        with pytest.raises((ValueError, FileNotFoundError)):
            folders.resolve(folders.DIFFUSERS, hostile)
    before = sana_state("sana")
    tiny_sana.edit(root / "sana" / "vae" / "config.json", scaling_factor=1.0)
    assert sana_state("sana") != before


def test_loading_leaves_the_global_random_numbers_alone(folder):
    from likeness.core.host.sana import load_sana

    before = torch.random.get_rng_state()
    with torch.inference_mode():
        load_sana(folder)
    assert torch.equal(before, torch.random.get_rng_state())
