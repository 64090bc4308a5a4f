"""Every transformer family of the running ComfyUI: what is trained is what a sampling gets, and it has a gradient."""

from __future__ import annotations

import pytest
import torch

from likeness.tests import gradients

from .. import tiny_families

FAMILIES = tiny_families.families()
TOKENS = 5
each_family = pytest.mark.parametrize("name", FAMILIES)


def predicted(model, positive, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The stock guider's prediction for a prompt."""
    import comfy.samplers

    found = []

    class Once(comfy.samplers.Sampler):
        def sample(self, wrap, _sigmas, extra_args, *_rest, **_more):
            found.append(wrap(x, sigma.expand(x.shape[0]), **extra_args))
            return x

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        highest = float(model.get_model_object("model_sampling").sigma_max)
        guider.sample(torch.zeros_like(x), torch.zeros_like(x), Once(), torch.tensor([highest, 0.0]), disable_pbar=True)
    return found[0]


@each_family
def test_tokens_stand_where_the_encoder_leaves_room(name):
    from likeness.core.prompt.host.placement import placement_for

    family = FAMILIES[name]
    placement = placement_for(family.model(), family.prompt(1))
    assert placement == ("tail" if family.padded else "append")


@each_family
def test_learned_tokens_are_seen_as_in_a_sampling_and_each_has_a_gradient(name):
    from likeness.core.prompt.conditioning import apply_embedding, with_room, with_tail
    from likeness.core.prompt.host.placement import placement_for
    from likeness.core.session.session import GuiderDenoiser, Session

    family = FAMILIES[name]
    model, source, latent = family.model(), family.prompt(1), family.latents()
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
