"""What the contract suite runs: one entry for each trained thing of the pack.

A method joins by adding an Entry to METHODS: how it is trained, applied, saved and loaded on a tiny model. Everything
else, from cancelling to working beside other packs' patches, is asked of all of them alike in test_contract.py.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .. import narrow_world, tiny_models
from .setting import Setting, autoencoder, levels, run_node, sample  # noqa: F401 (the tests take them from here)

STEPS = 3
_text_encoder = functools.cache(tiny_models.clip_l)


@dataclass(frozen=True)
class Entry:
    """One trained thing.

    fit(setting, **changes) -> (artifact, losses); apply(setting, artifact, strength) -> (MODEL, positive, negative);
    tensors(artifact) -> named tensors; save(artifact, folder) -> file; load(file) -> artifact; check_base(setting,
    artifact). None for the last three: what it gives is not kept in a file.
    """

    name: str
    families: tuple[str, ...]
    fit: Callable[..., tuple[Any, list[float]]]
    apply: Callable[[Setting, Any, float], tuple[Any, list, list]]
    tensors: Callable[[Any], dict[str, torch.Tensor]]
    save: Callable[[Any, Path], Path] | None = None
    load: Callable[[Path], Any] | None = None
    check_base: Callable[[Setting, Any], None] | None = None
    whole: dict[str, Any] = field(default_factory=dict)
    """Inputs with which every update sees the whole image."""
    longer_instead: bool = False
    """Asked for 2 steps after 3 were done it gives the 3, as it did not keep the 2."""
    says_so: bool = True
    """And the log tells; otherwise the node's report says how many there are."""
    rate: float = 0.03
    """At which 12 updates learn visibly and without going to and fro."""
    without: frozenset[str] = frozenset()
    """The PROMISES that do not apply, as the method has no such thing."""


PROMISES = frozenset({
    "strength",  # a number switches it off
    "seed",  # another one gives another result
    "falls",  # its loss is lower than without learning, update by update
    "mask",  # of the training image
    "batches",  # of training images, of any size
    "lengths",  # runs of other lengths go on with one another
    "prompt",  # it is trained with a CONDITIONING
    "patches",  # what other nodes put on the model is trained through
})  # fmt: skip
"""What not every method has. Everything else is asked of all."""


def _fit_hiper(setting: Setting, *, steps: int = STEPS, seed: int = 0, mask=None, save_every: int = 2, **more):
    from likeness.nodes.embedding import LikenessTrainEmbedding

    inputs = {
        "learning_rate": 0.02,
        "tokens": 5,
        "init": "source prompt",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "preview_steps": 0,
        "preview_cfg": 1.0,
        "latent": setting.latent,
    }
    inputs |= more
    output = run_node(
        LikenessTrainEmbedding,
        model=setting.model,
        positive=setting.source,
        steps=steps,
        save_every=save_every,
        seed=seed,
        mask=mask,
        **inputs,
    )
    return output[0], output[1]["loss"]


def _apply_hiper(setting: Setting, embedding, strength: float):
    from likeness.nodes.embedding import LikenessApplyEmbedding

    return (
        setting.model,
        run_node(LikenessApplyEmbedding, conditioning=setting.target, embedding=embedding, scale=strength, step=0)[0],
        setting.empty,
    )


def _save_embedding(embedding, folder: Path) -> Path:
    from likeness.core.embedding.artifact import save_embedding

    save_embedding(folder / "subject.safetensors", embedding)
    return folder / "subject.safetensors"


def _load_embedding(path: Path):
    from likeness.core.embedding.artifact import load_embedding

    return load_embedding(path)


def _check_embedding(setting: Setting, embedding) -> None:
    from likeness.nodes.embedding import LikenessApplyEmbedding

    run_node(
        LikenessApplyEmbedding, conditioning=setting.target, embedding=embedding, scale=1.0, step=0, model=setting.model
    )


def _fit_anchored(setting: Setting, **more):
    return _fit_hiper(setting, negative=setting.empty, init="empty prompt", anchor_weight=0.05, **more)


def _fit_step_wise(setting: Setting, *, steps: int = STEPS, save_every: int = 0, **more):
    """One update for each of `steps` denoising steps, from the prompt's own rows on."""
    from likeness.core.embedding.artifact import Embedding
    from likeness.core.session.fingerprint import fingerprint
    from likeness.nodes.embedding import LikenessRefineEmbedding

    first = Embedding({6: setting.source[0][0][:, -5:].clone()}, {"base": fingerprint(setting.model)})
    inputs = {"learning_rate": 0.02, "step": 0, "seed": 0, "inner_steps": 1, "latent": setting.latent, "mask": None}
    inputs |= {"model": setting.model, "positive": setting.source, "embedding": first}
    output = run_node(LikenessRefineEmbedding, **{**inputs, "sigmas": levels(setting, steps), **more})
    return output[0], output[1]["loss"]


def sine_inputs(setting: Setting, **more) -> dict[str, Any]:
    """Every input of LikenessFineTune."""
    return {
        "model": setting.model,
        "vae": autoencoder(),
        "image": setting.image,
        "positive": setting.source,
        "prompt": "photo of a sks dog",
        "method": "LoRA",
        "patches": True,
        "steps": STEPS,
        "learning_rate": 0.02,
        "rank": 4,
        "resolution": 64,
        "seed": 0,
        "whole_image": 0.0,
        "recon_weight": 0.1,
        "cells": 0,
        "interpolation": "bilinear",
        "crops": 5,
        "prior_weight": 0.0,
        "prior_prompt": "",
        "checkpointing": False,
        **more,
    }


def fit_sine(setting: Setting, **more):
    """The artifact and the losses of a fine-tune."""
    from likeness.nodes.fine_tune import LikenessFineTune

    output = run_node(LikenessFineTune, **sine_inputs(setting, **more))
    return output[2], output[3]["loss"]


def _fit_full(setting: Setting, *, learning_rate: float = 0.02, **more):
    return fit_sine(setting, method="full weights", learning_rate=learning_rate / 20, **more)


def _apply_tuned(setting: Setting, tuned, strength: float):
    from likeness.core.sine.host.position_map import apply_fine_tune

    with torch.inference_mode():
        return apply_fine_tune(tuned, setting.model, None, strength)[0], setting.target, setting.empty


def _save_tuned(tuned, folder: Path) -> Path:
    from likeness.core.lora.artifact import save_fine_tune

    save_fine_tune(folder / "tuned.safetensors", tuned)
    return folder / "tuned.safetensors"


def _load_tuned(path: Path):
    from likeness.core.sine.artifact import load_fine_tune

    return load_fine_tune(path)


def _check_tuned(setting: Setting, tuned) -> None:
    from likeness.core.session.fingerprint import check_base

    check_base(tuned.header["base"], setting.model)


@functools.cache
def _similarity_model():
    """A tiny CLIP."""
    from likeness.core.vision.host.vision import load_vision

    from ..vision.models import clip_folder

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        clip_folder(Path(folder))
        return load_vision(Path(folder))


def _fit_siso(setting: Setting, *, steps: int = STEPS, learning_rate: float = 0.02, seed: int = 0, **more):
    """A LoRA that makes one sampling step's image more like the setting's."""
    from likeness.nodes.optimize_lora import LikenessOptimizeLora
    from likeness.nodes.similarity import LikenessSimilarity

    alike = run_node(LikenessSimilarity, vision=_similarity_model(), image=setting.image, weight=1.0)[0]
    inputs = {"model": setting.model, "vae": autoencoder(setting.channels), "positive": setting.source}
    inputs |= {"negative": setting.empty, "similarity": alike, "sigmas": levels(setting, 1), "rank": 2, "patience": 0}
    inputs |= {"latent": {"samples": torch.zeros_like(setting.latent["samples"][:1])}, "cfg": 1.0, "grad_steps": 1}
    given = {"iterations": steps, "learning_rate": learning_rate, "seed": seed}
    output = run_node(LikenessOptimizeLora, **{**inputs, **given, **more})
    return output[2], output[5]["loss"]


@functools.cache
def _pictures() -> tempfile.TemporaryDirectory:
    """Two subjects of two images each."""
    folder = tempfile.TemporaryDirectory(prefix="likeness-pairs-", ignore_cleanup_errors=True)
    narrow_world.draw(Path(folder.name), range(2), 2)
    return folder


def _fit_adapter(setting: Setting, *, steps: int = STEPS, learning_rate: float = 1e-3, seed: int = 0):
    """An adapter of the model's own, with one image a step."""
    from likeness.core.ezigen.host.train import AdapterJob, train_adapter
    from likeness.core.ezigen.subject_pairs import PairFolder
    from likeness.core.ezigen.train import TrainingSettings

    pairs = PairFolder(Path(_pictures().name), 64, 1)
    settings = TrainingSettings(batch=1, learning_rate=learning_rate, seed=seed)
    with torch.inference_mode(), mock.patch("likeness.core.ezigen.host.train.CHECKED", 2):
        job = AdapterJob(setting.model, _text_encoder(), autoencoder(), pairs, settings, steps)
        adapter, losses, _ = train_adapter(job)
    return adapter, losses


def _apply_adapter(setting: Setting, adapter, strength: float):
    from likeness.core.ezigen.host.adapter import encode_subject, prepare_images, with_adapter

    with torch.inference_mode():
        seen = prepare_images(setting.image[:1], torch.ones(1, *setting.image.shape[1:3]), 64, 0.1)
        subject = encode_subject(setting.model, autoencoder(), setting.source, seen, 0)
        model = with_adapter(setting.model, adapter, subject, strength=strength)
    return model, setting.target, setting.empty


def _save_adapter(adapter, folder: Path) -> Path:
    from likeness.core.ezigen.artifact import save_adapter

    save_adapter(folder / "adapter.safetensors", adapter)
    return folder / "adapter.safetensors"


def _load_adapter(path: Path):
    from likeness.core.ezigen.artifact import read_adapter

    return read_adapter(path)


def _trajectory(setting: Setting, steps: int):
    from likeness.nodes.inversion import LikenessInvert

    inputs = {"model": setting.model, "positive": setting.source, "latent": setting.latent, "label": "published"}
    return run_node(LikenessInvert, sigmas=levels(setting, steps, of=steps), **inputs)[0]


def _fit_null_text(setting: Setting, *, steps: int = STEPS, learning_rate: float = 0.1):
    """One update of the negative of each denoising step."""
    from likeness.nodes.inversion import LikenessNullText

    inputs = {"model": setting.model, "positive": setting.source, "negative": setting.empty, "method": "null-text"}
    inputs |= {"cfg": 7.5, "start": "empty prompt", "inner_steps": 1, "epsilon": 0.0, "learning_rate": learning_rate}
    output = run_node(LikenessNullText, trajectory=_trajectory(setting, steps), **inputs)
    return output[0], output[1]["loss"]


@dataclass(frozen=True)
class _Noise:
    """A NOISE that leaves the global random numbers alone; ComfyUI's own sets their seed."""

    seed: int

    def generate_noise(self, latent: dict) -> torch.Tensor:
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def _fit_reference(setting: Setting, *, steps: int = STEPS, learning_rate: float = 0.1, seed: int = 0):
    """So many updates in one step of five; the artifact is the image with the model and negatives that make it."""
    from likeness.nodes.reference import LikenessReferenceGuide

    mask = torch.zeros(1, *setting.image.shape[1:3])
    mask[:, 16:48, 16:48] = 1
    inputs = {"model": setting.model, "positive": setting.source, "negative": setting.empty, "mask": mask, "cfg": 7.5}
    inputs |= {"noise": _Noise(seed), "trajectory": _trajectory(setting, 5), "inner_steps": steps}
    window = {"start_percent": 0.3, "end_percent": 0.5}
    output = run_node(LikenessReferenceGuide, **inputs, **window, learning_rate=learning_rate)
    return output[:3], output[3]["loss"]


def _reference_tensors(guided) -> dict[str, torch.Tensor]:
    latent, _, negative = guided
    return {"samples": latent["samples"], **{str(index): entry[0] for index, entry in enumerate(negative)}}


HIPER = Entry(
    name="hiper",
    families=("sd1", "sd2_v", "sdxl"),
    fit=_fit_hiper,
    apply=_apply_hiper,
    tensors=lambda embedding: {str(step): rows for step, rows in embedding.rows.items()},
    save=_save_embedding,
    load=_load_embedding,
    check_base=_check_embedding,
    rate=0.4,
)
METHODS = [
    HIPER,
    # Its loss is HiPer's and a distance that begins at 0.
    replace(HIPER, name="hifi", families=("sd1", "sdxl"), fit=_fit_anchored, without=frozenset({"falls"})),
    replace(HIPER, name="step-wise", families=("sd1", "sd2_v", "sdxl"), fit=_fit_step_wise, rate=0.03),
    Entry(
        name="sine",
        families=("sd1", "sd2_v", "sdxl"),
        fit=fit_sine,
        apply=_apply_tuned,
        tensors=dict,
        save=_save_tuned,
        load=_load_tuned,
        check_base=_check_tuned,
        whole={"patches": False},
        longer_instead=True,
    ),
    Entry(
        name="sine-full",
        families=("sd1", "sd2_v", "sdxl"),
        fit=_fit_full,
        apply=_apply_tuned,
        tensors=dict,
        save=_save_tuned,
        load=_load_tuned,
        check_base=_check_tuned,
        whole={"patches": False},
    ),
    Entry(
        name="siso",
        families=("sd1", "sd2_v", "sdxl", "flux"),
        fit=_fit_siso,
        rate=0.003,  # at ten times as much the loss jumps about, and rounding decides who wins
        apply=_apply_tuned,
        tensors=dict,
        save=_save_tuned,
        load=_load_tuned,
        check_base=_check_tuned,
        longer_instead=True,
        says_so=False,
        without=frozenset({"mask"}),
    ),
    Entry(
        name="adapter",
        families=("sd1",),
        fit=_fit_adapter,
        apply=_apply_adapter,
        tensors=lambda adapter: adapter.tensors,
        save=_save_adapter,
        load=_load_adapter,
        without=frozenset({"mask", "prompt", "falls"}),
    ),
    Entry(
        name="null-text",
        families=("sd1", "sd2_v", "sdxl"),
        fit=_fit_null_text,
        apply=lambda setting, negative, _strength: (setting.model, setting.target, negative),
        tensors=lambda negative: {str(index): entry[0] for index, entry in enumerate(negative)},
        without=frozenset({"strength", "seed", "mask", "batches", "lengths"}),
    ),
    Entry(
        name="reference",
        families=("sd1", "sd2_v", "sdxl"),
        fit=_fit_reference,
        apply=lambda setting, guided, _strength: (guided[1], setting.target, guided[2]),
        tensors=_reference_tensors,
        without=frozenset({"strength", "mask", "batches"}),
    ),
]
