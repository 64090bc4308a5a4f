"""A LoRA of Sana: its gradients, and the file in stock nodes and in diffusers."""

from __future__ import annotations

import logging

import pytest
import torch

from likeness.tests import gradients

from ..vision.models import clip_folder
from .sana import CFG, PROMPT, SEED, SHAPE, empty, levels, pictured, reference
from .test_contract import forget_runs

LIMIT = 0.01


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_through_the_autoencoder(sana, checkpointing):
    with torch.inference_mode():
        latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        found = gradients.check_vae_decode(sana.vae, latent, checkpointing=checkpointing)
    assert abs(found.numeric) > 1e-3 and found.relative_error < LIMIT, found


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A tiny CLIP."""
    from likeness.core.vision.host.vision import load_vision

    where = tmp_path_factory.mktemp("vision") / "clip"
    clip_folder(where)
    with torch.inference_mode():
        return load_vision(where)


def optimised(sana, sana_prompts, vision, clip=None, **changes):
    from likeness.core.siso.host.optimize_lora import Generator, Sampling, SisoJob, SisoPlan, optimize_lora
    from likeness.core.siso.host.similarity import Similarity, SimilarityPart
    from likeness.core.siso.siso import SisoSettings

    found = {"iterations": 6, "rate": 0.02, **changes}
    coarse = torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(6))
    subject = torch.nn.functional.interpolate(coarse, size=(64, 128), mode="bilinear").movedim(1, -1)
    sampling = Sampling(empty(), levels(sana.model), SEED, CFG, 3)
    with torch.inference_mode():
        job = SisoJob(
            Generator(sana.model, sana.vae, *sana_prompts, clip, PROMPT),
            Similarity((SimilarityPart(vision, 1.0, subject),)),
            sampling,
            SisoPlan(found["iterations"], 2, "best"),
            SisoSettings(found["rate"], 1e-4, 0.0, 0.0, patience=0),
        )
        return optimize_lora(job)


@pytest.fixture(scope="module")
def learned(sana, sana_prompts, vision, tmp_path_factory):
    """An optimisation, with the images of the model as it is before and after."""
    import folder_paths

    before = folder_paths.get_user_directory()
    folder_paths.set_user_directory(str(tmp_path_factory.mktemp("user")))
    try:
        yield Learned(sana, sana_prompts, vision)
    finally:
        folder_paths.set_user_directory(before)


class Learned:
    """A LoRA of Sana, and the image without it before and after."""

    def __init__(self, sana, sana_prompts, vision) -> None:
        self.before = pictured(sana.model, sana.vae, sana_prompts, levels(sana.model))
        weights = dict(sana.model.model.named_parameters())
        self.found = optimised(sana, sana_prompts, vision, iterations=12)
        self.after = pictured(sana.model, sana.vae, sana_prompts, levels(sana.model))
        self.same = all(value is weights[name] for name, value in sana.model.model.named_parameters())


def test_the_pictures_become_more_alike_and_the_model_stays_as_it_is(learned):
    assert learned.found.losses[learned.found.best] < learned.found.losses[0] - 1e-3
    assert torch.equal(learned.before, learned.after) and learned.same
    assert float((learned.before - learned.found.images[:1]).abs().max()) < 1 / 254


def test_the_lora_in_stock_nodes_makes_the_kept_picture(sana, sana_prompts, learned, caplog):
    import comfy.sd

    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        tuned, _ = comfy.sd.load_lora_for_models(sana.model, None, learned.found.lora, 1.0, 0.0)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage().lower()]
    blocks, both, projections = 2, 2, 3
    assert len(tuned.patches) == blocks * both * projections == len(learned.found.lora) // 2
    again = pictured(tuned, sana.vae, sana_prompts, levels(sana.model))
    torch.testing.assert_close(again, learned.found.image, atol=1e-4, rtol=0)
    assert float((again - learned.before).abs().max()) > 1e-3


def test_the_lora_in_diffusers_makes_the_kept_picture(sana, sana_prompts, learned, sana_pipeline, tmp_path):
    from safetensors.torch import save_file

    save_file(learned.found.lora, str(tmp_path / "subject.safetensors"))
    with torch.inference_mode(False):
        sana_pipeline.load_lora_weights(str(tmp_path), weight_name="subject.safetensors")
    wanted, sigmas = reference(sana_pipeline)
    import comfy.sd

    with torch.inference_mode():
        tuned, _ = comfy.sd.load_lora_for_models(sana.model, None, learned.found.lora, 1.0, 0.0)
    found = pictured(tuned, sana.vae, sana_prompts, sigmas)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert float((pictured(sana.model, sana.vae, sana_prompts, sigmas) - wanted).abs().max()) > 1e-3


def test_stopped_early_it_goes_on_as_if_it_had_not_been(sana, sana_prompts, vision, own_folders, tmp_path):
    whole = optimised(sana, sana_prompts, vision, iterations=5)
    forget_runs(tmp_path)
    first = optimised(sana, sana_prompts, vision, iterations=2)
    again = optimised(sana, sana_prompts, vision, iterations=5)
    assert first.losses == whole.losses[:2] and again.losses == whole.losses
    assert all(torch.equal(again.lora[name], value) for name, value in whole.lora.items())


def test_its_text_encoder_is_not_trained(sana, sana_prompts, vision):
    with pytest.raises(ValueError, match="disconnect 'clip'"):
        optimised(sana, sana_prompts, vision, clip=sana.clip)


def random_lora(model, seed: int = 4) -> dict[str, torch.Tensor]:
    """Weights of a LoRA file, under the names that the pack writes for Sana."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, layer in model.model.lora_layers().items():
        rows, columns = layer.weight.shape
        found[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
        found[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, columns, generator=generator)
    return found


def guided(sana, sana_prompts, tuned) -> torch.Tensor:
    from likeness.nodes.guidance import LikenessGuidance

    from .setting import run_node

    inputs = {"model": sana.model, "tuned": tuned, "tuned_positive": sana_prompts[0]}
    model = run_node(LikenessGuidance, **inputs, base_weight=0.6, end_percent=1.0)[0]
    return pictured(model, sana.vae, sana_prompts, levels(sana.model))


def test_a_lora_of_sana_guides_beside_the_model_that_it_was_trained_on(sana, sana_prompts, sana_folder):
    """Sana's layers are not ComfyUI's, but take a LoRA beside them: as with a second copy of the folder."""
    import comfy.sd

    from likeness.core.sana.host.sana import load_sana

    weights, pictures = random_lora(sana.model), []
    for model in (sana.model, load_sana(sana_folder)[0]):
        with torch.inference_mode():
            tuned = comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)[0]
        pictures.append(guided(sana, sana_prompts, tuned))
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)
    plain = pictured(sana.model, sana.vae, sana_prompts, levels(sana.model))
    assert float((pictures[0] - plain).abs().mean()) > 1e-3


def test_other_patches_of_sana_cannot_be_separated(sana, sana_prompts):
    tuned = sana.model.clone()
    name = "diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    tuned.add_patches({name: ("diff", (torch.ones_like(sana.model.model.state_dict()[name]),))})
    with pytest.raises(ValueError, match="cannot be separated .* no plain LoRA: load a copy"):
        guided(sana, sana_prompts, tuned)
