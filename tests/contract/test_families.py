"""Every transformer family of the running ComfyUI: what is trained is what a sampling gets, and it has a gradient."""

from __future__ import annotations

import pytest
import torch

from likeness.tests import gradients

from .. import tiny_families, tiny_models
from .methods import _similarity_model, run_node, sample

FAMILIES = tiny_families.families()
TOKENS = 5
each_family = pytest.mark.parametrize("name", FAMILIES)


def model_of(name: str):
    """The family's MODEL, for all tests that leave its weights as they are."""
    return tiny_models.shared(("family", name), FAMILIES[name].model)


def predicted(model, positive, x: torch.Tensor, sigma: torch.Tensor, negative=None, cfg: float = 1.0) -> torch.Tensor:
    """The stock guider's prediction for a prompt."""
    import comfy.samplers

    found = []

    class Once(comfy.samplers.Sampler):
        def sample(self, wrap, _sigmas, extra_args, *_rest, **_more):
            found.append(wrap(x, sigma.expand(x.shape[0]), **extra_args))
            return x

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive} | ({} if negative is None else {"negative": negative}))
        guider.set_cfg(cfg)
        highest = float(model.get_model_object("model_sampling").sigma_max)
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), Once(), torch.tensor([highest, 0.0]), disable_pbar=True)
    return found[0]


@each_family
def test_tokens_stand_where_the_encoder_leaves_room(name):
    from likeness.core.prompt.conditioning import placement_for

    family = FAMILIES[name]
    placement = placement_for(model_of(name), family.prompt(1))
    assert placement == ("tail" if family.padded else "append")


@each_family
def test_learned_tokens_are_seen_as_in_a_sampling_and_each_has_a_gradient(name):
    from likeness.core.prompt.conditioning import apply_embedding, placement_for, with_room, with_tail
    from likeness.core.session.session import GuiderDenoiser, Session

    family = FAMILIES[name]
    model, source, latent = model_of(name), family.prompt(1), family.latents()
    rows = torch.randn(TOKENS, family.width, generator=torch.Generator().manual_seed(8))
    placement, found = placement_for(model, source), []
    sigmas = model.get_model_object("model_sampling").sigmas
    sigma = sigmas[len(sigmas) // 2].float().view(1)
    x = family.latents(2) * max(1.0, float(sigma))

    def body(denoiser: GuiderDenoiser, _x0: torch.Tensor) -> None:
        context = denoiser.context.float()
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

        def function(h: torch.Tensor) -> torch.Tensor:
            return (denoiser.denoised(x.clone(), sigma, with_tail(context, h)) * weight).sum()

        found.append(denoiser.denoised(x.clone(), sigma, with_tail(context, rows)).detach())
        found.append(denoiser.denoised(x.clone(), sigma).detach())
        found.append(gradients.gradient_check("tokens", function, rows))
        leaf = rows.clone().requires_grad_(True)
        found.append(torch.autograd.grad(function(leaf), leaf)[0])

    Session(model, with_room(source, TOKENS, placement), latent, learned=TOKENS).run(body)
    ours, without, check, gradient = found
    wanted = predicted(model, apply_embedding(source, rows[None], 1.0, (), placement), x, sigma)
    effect = float((wanted - without).abs().mean())
    error = float((ours - wanted).abs().mean())
    assert error < 1e-5 * float(wanted.std()) and error < 0.01 * effect, (error, effect)
    assert bool(gradient.any(-1).all())
    assert check.relative_error < 0.01, check


@each_family
@pytest.mark.parametrize("kind", ["attention", "all"])
def test_a_lora_of_its_layers_is_what_the_stock_loader_makes_of_the_file(name, kind, tmp_path, caplog):
    import comfy.sd
    import comfy.utils
    from safetensors.torch import save_file

    from likeness.core.lora.host.layers import check_run, network_layers, trained_layers
    from likeness.core.lora.low_rank import attached_lora, factors, new_adapters
    from likeness.core.session.session import GuiderDenoiser, Session

    family = FAMILIES[name]
    model, source = model_of(name), family.prompt(1)
    trained = trained_layers(model.model, kind=kind)
    modules = {id(getattr(layer, "layer", layer)) for layer in trained.layers.values()}
    assert modules <= {id(layer) for layer in network_layers(model.model, "all").values()}
    sigmas = model.get_model_object("model_sampling").sigmas
    sigma, x, found = sigmas[len(sigmas) // 2].float().view(1), family.latents(2), []

    def body(denoiser: GuiderDenoiser, _x0: torch.Tensor) -> None:
        layers = trained_layers(denoiser.model, kind=kind)
        check_run(denoiser.model, layers.layers, denoiser.called)
        adapters = new_adapters(layers.layers, 2, 0, deviation=0.2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad(), attached_lora(layers.layers, adapters):
            for adapter in adapters.values():
                adapter.up.normal_(0, 0.2, generator=generator)
            found.append(denoiser.denoised(x.clone(), sigma))
            found.append(layers.tensors(factors(adapters)))

    Session(model, source, family.latents()).run(body)
    ours, tensors = found
    save_file(tensors, tmp_path / "lora.safetensors")
    with torch.inference_mode():
        read = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
        patched, _ = comfy.sd.load_lora_for_models(model, None, read, 1.0, 0.0)
    plain, wanted = predicted(model, source, x, sigma), predicted(patched, source, x, sigma)
    assert "not loaded" not in caplog.text
    error, effect = float((ours - wanted).abs().mean()), float((wanted - plain).abs().mean())
    assert error < 1e-4 * float(wanted.std()) and error < 0.01 * effect, (error, effect)


@each_family
def test_the_gradient_of_a_lora_and_of_the_latent(name):
    family = FAMILIES[name]
    for check in (gradients.check_lora, gradients.check_latent):
        found = check(model_of(name), family.prompt(1), family.latents())
        assert abs(found.numeric) > 1e-3 and found.relative_error < 0.01, found


@each_family
def test_checkpointing_saves_memory_and_gives_the_same_gradient(name):
    from likeness.core.session.session import GuiderDenoiser, Session

    family = FAMILIES[name]
    model, source, latent = model_of(name), family.prompt(1), family.latents()
    stored, gradient = [], []

    def body(denoiser: GuiderDenoiser, x0: torch.Tensor) -> None:
        sigma = denoiser.sigmas[len(denoiser.sigmas) // 2].view(1)
        x, seen = x0.clone().requires_grad_(True), {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            if value.requires_grad:  # neither a weight nor the prompt
                seen[value.data_ptr()] = value.numel() * value.element_size()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = denoiser.denoised(x, sigma)
        stored.append(sum(seen.values()))
        gradient.append(torch.autograd.grad(out.square().mean(), x)[0])

    for checkpointing in (False, True):
        Session(model, source, latent, checkpointing=checkpointing).run(body)
    assert stored[1] < stored[0] / 2, stored
    plain, recomputed = gradient
    assert float((plain - recomputed).abs().max()) <= 1e-6 * float(plain.abs().max())


def image_of(*size: int) -> torch.Tensor:
    """An image of smooth colours."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").movedim(1, -1)


@pytest.mark.usefixtures("own_folders")
@each_family
def test_an_embedding_is_trained_from_an_image_with_mask_and_previews(name):
    from likeness.nodes.embedding import LikenessApplyEmbedding, LikenessRefineEmbedding, LikenessTrainEmbedding

    family = FAMILIES[name]
    model, mask = model_of(name), torch.zeros(1, *family.size)
    mask[:, :, family.size[1] // 2 :] = 1
    data = {"image": image_of(*family.size), "vae": family.autoencoder(), "mask": mask, "negative": family.prompt(3)}
    settings = {"steps": 1, "learning_rate": 0.02, "tokens": TOKENS, "save_every": 1, "init": "source prompt"}
    settings |= {"start_percent": 0.0, "end_percent": 1.0, "preview_steps": 1, "preview_cfg": 1.0, "seed": 0}
    shared = {"model": model, "positive": family.prompt(1), **data, "anchor_weight": 0.01}
    embedding, loss, previews = run_node(LikenessTrainEmbedding, **shared, **settings, target=family.prompt(2))
    assert len(loss["loss"]) == 2 and previews.shape == (1, *family.size, 3)
    sigmas = torch.tensor([0.9, 0.5, 0.0]) * float(model.get_model_object("model_sampling").sigma_max)
    refining = {"embedding": embedding, "sigmas": sigmas, "inner_steps": 1, "learning_rate": 0.02, "step": 0, "seed": 0}
    refined, _ = run_node(LikenessRefineEmbedding, **shared, **refining)
    inputs = {"conditioning": family.prompt(2), "embedding": refined, "scale": 1.0, "step": 0}
    applied = run_node(LikenessApplyEmbedding, **inputs)[0]
    assert refined.placement == embedding.placement and len(applied) == 2
    latent = {"samples": family.latents()}
    plain, subject = (sample(model, each, family.prompt(3), latent, steps=1) for each in (family.prompt(2), applied))
    assert bool(torch.isfinite(subject).all()) and not torch.equal(plain, subject)


@pytest.mark.usefixtures("own_folders")
@each_family
def test_a_fine_tune_with_mask_and_prior_images_is_trained(name):
    from likeness.nodes.fine_tune import LikenessFineTune

    family = FAMILIES[name]
    image = image_of(family.image, family.image)
    inputs = {"model": model_of(name), "vae": family.autoencoder(), "image": image, "patches": True}
    inputs |= {"positive": family.prompt(1), "prompt": "photo of a sks dog", "steps": 1, "learning_rate": 0.01}
    inputs |= {"rank": 2, "resolution": family.image, "seed": 0, "whole_image": 0.0, "recon_weight": 0.0, "cells": 0}
    inputs |= {"interpolation": "bilinear", "crops": 2, "mask": torch.ones(1, family.image, family.image)}
    prior = {"prior_weight": 1.0, "prior_image": image, "prior_positive": family.prompt(2)}
    whole = {"prior_weight": 0.0, "checkpointing": False}
    kinds = {"LoRA": {**prior, "checkpointing": True}, "full weights": whole}

    def sampled(model) -> torch.Tensor:
        return sample(model, family.prompt(2), family.prompt(3), {"samples": family.latents()}, steps=1)

    before = sampled(inputs["model"])
    for method, more in kinds.items():
        tuned, _, artifact, loss = run_node(LikenessFineTune, method=method, prior_prompt="", **inputs, **more)
        assert len(loss["loss"]) == 2 and len(artifact) > 10
        assert not torch.equal(before, sampled(tuned))


@pytest.mark.usefixtures("own_folders")
@each_family
def test_the_image_of_an_optimized_lora_is_the_stock_samplers(name):
    import comfy.sample
    import comfy.samplers

    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    family, seed = FAMILIES[name], 4
    model, vae, positive = model_of(name), family.autoencoder(), family.prompt(1)
    alike = run_node(LikenessSimilarity, vision=_similarity_model(), image=image_of(*family.size), weight=1.0)[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    shape = family.latent if len(family.latent) == 4 else (*family.latent[:2], *family.latent[3:])
    inputs = {"model": model, "vae": vae, "positive": positive, "similarity": alike, "sigmas": sigmas, "rank": 2}
    inputs |= {"latent": {"samples": torch.zeros(shape)}, "cfg": 1.0, "grad_steps": 1, "iterations": 2, "patience": 0}
    tuned, _, lora, best, _, loss, _ = run_node(LikenessOptimizeLora, **inputs, learning_rate=0.02, seed=seed)
    assert len(set(loss["loss"])) == 2 and any(value.any() for value in lora.values())
    noise = torch.randn(family.latent, generator=torch.Generator().manual_seed(seed))
    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        samples = comfy.sample.sample_custom(
            tuned, noise, 1.0, euler, sigmas, positive, positive, torch.zeros(family.latent), disable_pbar=True
        )
        stock = vae.decode(samples).flatten(0, -4)
    torch.testing.assert_close(best, stock, atol=1e-4, rtol=0)
