"""What a user of SINE's nodes gets for bad input: one sentence that helps, before any work is done."""

from __future__ import annotations

import re

import pytest

from likeness.toyworld import workflows

from .test_training_input import refused, with_node

MODEL, CLIP, VAE = (["model", index] for index in range(3))


@pytest.fixture(scope="module")
def loaded() -> dict:
    """A base model, a second one as the tuned model, and their prompts."""
    prompt = {}
    for name in ("model", "tuned"):
        prompt = with_node(prompt, name, "CheckpointLoaderSimple", ckpt_name=workflows.CHECKPOINT)
    for name in ("edit", "trained", "negative"):
        prompt = with_node(prompt, name, "CLIPTextEncode", clip=CLIP, text=name)
    return with_node(prompt, "canvas", "EmptyLatentImage", width=96, height=96, batch_size=1)


def sampled(prompt: dict, **guidance) -> dict:
    """A guided sampling to the end."""
    inputs = {"model": MODEL, "tuned": ["tuned", 0], "tuned_positive": ["trained", 0]}
    values = {"base_weight": 0.7, "end_percent": 0.6, "start_percent": 0.0, "k_timestep": -1, "allow_over_one": False}
    prompt = with_node(prompt, "guided", "LikenessGuidance", **{**inputs, **values, **guidance})
    sampler = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"positive": ["edit", 0], "negative": ["negative", 0], "latent_image": ["canvas", 0]}
    prompt = with_node(prompt, "sample", "KSampler", model=["guided", 0], **sampler, **links)
    prompt = with_node(prompt, "decode", "VAEDecode", samples=["sample", 0], vae=VAE)
    return with_node(prompt, "show", "PreviewImage", images=["decode", 0])


def tuned_on(prompt: dict, side: int, **changes) -> dict:
    """A fine-tuning on a grey image of this side, to the saver."""
    prompt = with_node(prompt, "picture", "EmptyImage", width=side, height=side, batch_size=1, color=8421504)
    inputs = {"model": MODEL, "vae": VAE, "image": ["picture", 0], "positive": ["trained", 0], "prompt": "trained"}
    values = {"method": "LoRA", "patches": True, "steps": 2, "learning_rate": 1e-3, "rank": 4, "resolution": 96}
    more = {"seed": 1, "whole_image": 0.0, "recon_weight": 1.0, "cells": 24, "interpolation": "bilinear", "crops": 2}
    last = {"prior_weight": 0.0, "prior_prompt": "", "checkpointing": False}
    wanted = {**inputs, **values, **more, **last, **changes}
    inputs = {name: value for name, value in wanted.items() if value is not None}
    prompt = with_node(prompt, "tune", "LikenessFineTune", **inputs)
    return with_node(prompt, "save", "LikenessSaveTuned", lora=["tune", 2], filename_prefix="likeness/never")


GUIDANCE = {
    "K outside of the schedule": ({"k_timestep": 5000}, "bigger than max"),
    "a weight over one": ({"base_weight": 1.5}, "bigger than max"),
    "a window that ends before it begins": ({"start_percent": 0.9}, "give a start below the end"),
}


@pytest.mark.parametrize("case", GUIDANCE)
def test_guidance(server, loaded, case):
    changes, expected = GUIDANCE[case]
    assert re.search(expected, refused(server, sampled(loaded, **changes)))


def test_weights_that_add_up_to_more_than_one(server, loaded):
    values = {"weight": 0.9, "end_percent": 0.6, "start_percent": 0.0, "k_timestep": -1}
    links = {"model": ["tuned", 0], "positive": ["trained", 0]}
    prompt = with_node(loaded, "second", "LikenessSubjectModel", **links, **values)
    assert re.search(r"add up to 1\.2.*allow_over_one", refused(server, sampled(prompt, subjects=["second", 0])))


def test_a_tuned_model_of_another_noise_schedule(server, loaded):
    changed = {"model": ["tuned", 0], "sampling": "eps", "zsnr": True}
    prompt = with_node(loaded, "other", "ModelSamplingDiscrete", **changed)
    assert "noise schedule" in refused(server, sampled(prompt, tuned=["other", 0]))


TUNING = {
    "an image smaller than the cells": (8, {}, "less than the 24 x 24 cells"),
    "no prompt for the model": (96, {"positive": None}, "Connect either a CLIP"),
    "no steps": (96, {"steps": 0}, "smaller than min"),
}


@pytest.mark.parametrize("case", TUNING)
def test_fine_tuning(server, loaded, case):
    side, changes, expected = TUNING[case]
    assert expected in refused(server, tuned_on(loaded, side, **changes))
    assert not list(server.base.rglob("never*"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3, half", "'half', which is not a number"),
        ("0,3", "with a point"),
        ("", "is empty"),
        ("9" * 5000, "24 numbers"),
    ],
)
def test_sweep(server, text, expected):
    prompt = with_node({}, "sweep", "LikenessSweep", base_weights=text, end_percents="0.6")
    assert expected in refused(server, with_node(prompt, "show", "PreviewAny", source=["sweep", 0]))
