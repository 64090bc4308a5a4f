"""SISO against the official functions' own numbers, on their tiny networks."""

from __future__ import annotations

import pytest
import torch

from likeness.core.inversion.renoise import (
    ancestral_step,
    autocorrelation,
    corrected_noise,
    inverse_ancestral_step,
    patch_kl,
    regularize,
)
from likeness.core.siso.siso import PATIENCE, background_error, plateau, similarity_loss
from likeness.core.vision.instance_retrieval import PREPROCESS, from_published

from .siso_numbers import DINO, part, picture
from .unets import arrays


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return arrays("siso.npz")


@pytest.mark.parametrize("name", ["subject", "generated"])
@pytest.mark.parametrize("model", ["dino", "ir"])
def test_pictures_are_prepared_as_published(official, name, model):
    found = (DINO if model == "dino" else PREPROCESS)(picture(official, name))
    assert list(found.shape) == official[f"{model}.pre.shape"].tolist()
    torch.testing.assert_close(found[..., ::37, ::37], official[f"{model}.pre.{name}.sub37"], atol=2e-5, rtol=0)


def test_instance_retrieval_features_loss_and_gradient(official):
    model = from_published(part(official, "ir.w."), heads=2)
    with torch.no_grad():
        subject = model(PREPROCESS(picture(official, "subject")))
    generated = picture(official, "generated").clone().requires_grad_(True)
    found = model(PREPROCESS(generated))
    torch.testing.assert_close(subject, official["ir.feat.subject"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.detach(), official["ir.feat.generated"], atol=1e-5, rtol=0)
    loss = similarity_loss(found, subject)
    assert float(loss.detach()) == pytest.approx(float(official["ir.loss"]), abs=1e-5)
    loss.backward()
    torch.testing.assert_close(generated.grad.movedim(-1, 1), official["ir.grad"], atol=1e-4, rtol=1e-4)
    assert float((generated.grad.movedim(-1, 1) - official["ir.grad"]).norm() / official["ir.grad"].norm()) < 1e-4


def test_background_error(official):
    found = background_error(official["bg.a"], official["bg.b"], official["bg.mask"])
    assert float(found) == pytest.approx(float(official["bg.loss"]), abs=1e-6)


CURVES = ("falling", "plateau", "noisy", "positive")


@pytest.mark.parametrize("script", ["sdxl", "flux", "sana", "edit"])
@pytest.mark.parametrize("curve", CURVES)
def test_stopping_as_published(official, curve, script):
    best, count, stop = [], [], -1
    for index, state in enumerate(plateau(official[f"es.{curve}.losses"].tolist(), published=True)):
        best.append(state[0])
        count.append(state[1])
        if state[1] >= PATIENCE:
            stop = index
            break
    expected = part(official, f"es.{curve}.{script}.")
    assert best == expected["best"].tolist() and count == expected["count"].tolist() and stop == int(expected["stop"])


@pytest.mark.parametrize("curve", CURVES)
def test_the_default_rule_differs_for_positive_losses_alone(official, curve):
    losses = official[f"es.{curve}.losses"].tolist()
    ours, theirs = list(plateau(losses)), list(plateau(losses, published=True))
    end = next((index for index, (_, count) in enumerate(ours) if count >= PATIENCE), len(losses) - 1)
    assert (ours[: end + 1] == theirs[: end + 1]) == (curve != "positive")
    assert curve != "positive" or ours[end][1] >= PATIENCE > max(count for _, count in theirs[: end + 1])


def test_renoise_measures_of_noise(official):
    e, like = official["rn.e"], official["rn.opt"]
    assert float(patch_kl(e, like)) == pytest.approx(float(official["rn.kl"]), rel=1e-5)
    assert float(autocorrelation(e)) == pytest.approx(float(official["rn.ac_noshift"]), rel=1e-4)
    drawn = autocorrelation(e, torch.Generator().manual_seed(3))
    assert float(drawn) == pytest.approx(float(official["rn.ac_seed3"]), rel=1e-4)
    found = regularize(e, like, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, official["rn.reg_seed3"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("timestep", [749, 499, 249])
def test_renoise_steps(official, timestep):
    index = official["rn.timesteps"].tolist().index(timestep)
    sigma, following = official["rn.sigmas"][index : index + 2]
    e, like, noise = official["rn.e"], official["rn.opt"], official[f"rn.noise{index}"]
    torch.testing.assert_close(
        ancestral_step(e, like, noise, sigma, following), official[f"rn.step.{timestep}"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        inverse_ancestral_step(e, like, noise, sigma, following), official[f"rn.inv.{timestep}"], atol=1e-4, rtol=0
    )
    fixed = corrected_noise(noise, e, like, 0.5 * e, sigma, following)
    torch.testing.assert_close(fixed, official[f"rn.noise_fixed.{timestep}"][index], atol=1e-4, rtol=0)
