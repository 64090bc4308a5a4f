"""What the contract suite runs: one entry for each trained thing of the pack.

A method joins by adding an Entry to METHODS: how it is trained, applied, saved and loaded on a tiny model. Everything
else, from cancelling to working beside other packs' patches, is asked of all of them alike in test_contract.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import tiny_models

STEPS = 6


@dataclass
class Setting:
    """What a method is given: a model of a family, one or more pictures, a prompt and its negative."""

    family: str = "sd1"
    model_seed: int = 0
    images: int = 1
    size: tuple[int, int] = (8, 8)

    def __post_init__(self) -> None:
        known = {**tiny_models.FAMILIES, **tiny_models.TRANSFORMERS}
        self.model = known[self.family][0](self.model_seed)
        generator = torch.Generator().manual_seed(5)
        self.channels = self.model.model.latent_format.latent_channels
        self.latent = {"samples": torch.randn(self.images, self.channels, *self.size, generator=generator)}
        self.source, self.target, self.empty = (tiny_models.prompt(self.family, seed) for seed in (1, 2, 3))

    @functools.cached_property
    def image(self) -> torch.Tensor:
        """Pictures of smooth colours, as large as the latents say."""
        coarse = torch.rand(self.images, 3, 4, 4, generator=torch.Generator().manual_seed(6))
        size = (8 * self.size[0], 8 * self.size[1])
        return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").movedim(1, -1)


@functools.cache
def autoencoder(channels: int = 4):
    """One VAE for all settings with so many latent channels."""
    return tiny_models.taesd(channels=channels)


@dataclass(frozen=True)
class Entry:
    """One trained thing. training: the module whose optimise() trains it. whole: inputs with which every update sees
    the whole picture. longer_instead: asked for 8 steps after 9 were done, it gives the 9, as it did not keep the 8.

    fit(setting, **changes) -> (artifact, losses); apply(setting, artifact, strength) -> (MODEL, positive CONDITIONING);
    tensors(artifact) -> named tensors; save(artifact, name) -> file; load(file) -> artifact; check_base(setting,
    artifact).
    """

    name: str
    families: tuple[str, ...]
    fit: Callable[..., tuple[Any, list[float]]]
    apply: Callable[[Setting, Any, float], tuple[Any, list]]
    tensors: Callable[[Any], dict[str, torch.Tensor]]
    save: Callable[[Any, Path], Path]
    load: Callable[[Path], Any]
    check_base: Callable[[Setting, Any], None]
    training: str
    whole: dict[str, Any] = field(default_factory=dict)
    longer_instead: bool = False


def _fit_hiper(setting: Setting, *, steps: int = STEPS, seed: int = 0, mask=None, save_every: int = 4, **more):
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

    return setting.model, run_node(
        LikenessApplyEmbedding, conditioning=setting.target, embedding=embedding, scale=strength, step=0
    )[0]


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


def levels(setting: Setting, count: int) -> torch.Tensor:
    """The first so many levels of a sampling of 50 steps, then 0."""
    import comfy.samplers

    sampling = setting.model.get_model_object("model_sampling")
    return torch.cat([comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 50)[:count], torch.zeros(1)])


def _fit_step_wise(setting: Setting, *, steps: int = STEPS, save_every: int = 0, **more):
    """One update for each of `steps` denoising steps, from the prompt's own rows on."""
    from likeness.core.embedding.artifact import Embedding
    from likeness.core.session.fingerprint import fingerprint
    from likeness.nodes.refine import LikenessRefineEmbedding

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
        return apply_fine_tune(tuned, setting.model, None, strength)[0], setting.target


def _save_tuned(tuned, folder: Path) -> Path:
    from likeness.core.lora.artifact import save_tuned

    save_tuned(folder / "tuned.safetensors", tuned)
    return folder / "tuned.safetensors"


def _load_tuned(path: Path):
    from likeness.core.sine.artifact import load_fine_tune

    return load_fine_tune(path)


def _check_tuned(setting: Setting, tuned) -> None:
    from likeness.core.session.fingerprint import check_base

    check_base(tuned.header["base"], setting.model)


HIPER = Entry(
    name="hiper",
    families=("sd1", "sd2_v", "sdxl"),
    fit=_fit_hiper,
    apply=_apply_hiper,
    tensors=lambda embedding: {str(step): rows for step, rows in embedding.rows.items()},
    save=_save_embedding,
    load=_load_embedding,
    check_base=_check_embedding,
    training="embedding_training",
)
METHODS = [
    HIPER,
    replace(HIPER, name="hifi", families=("sd1", "sdxl"), fit=_fit_anchored),
    replace(HIPER, name="step-wise", families=("sd1", "sdxl"), fit=_fit_step_wise, training="refining"),
    Entry(
        name="sine",
        families=("sd1", "sd2_v", "sdxl"),
        fit=fit_sine,
        apply=_apply_tuned,
        tensors=dict,
        save=_save_tuned,
        load=_load_tuned,
        check_base=_check_tuned,
        training="fine_tuning",
        whole={"patches": False},
        longer_instead=True,
    ),
    Entry(
        name="sine-full",
        families=("sd1", "sdxl"),
        fit=_fit_full,
        apply=_apply_tuned,
        tensors=dict,
        save=_save_tuned,
        load=_load_tuned,
        check_base=_check_tuned,
        training="fine_tuning",
        whole={"patches": False},
    ),
]


def run_node(node: type, **inputs: Any) -> tuple:
    """Execute a node as ComfyUI does, under inference mode and on a copy of its class; works for both node styles."""
    with torch.inference_mode():
        if hasattr(node, "PREPARE_CLASS_CLONE"):
            return tuple(node.PREPARE_CLASS_CLONE({}).execute(**inputs).args)
        return tuple(getattr(node(), node.FUNCTION)(**inputs))


def sample(
    model: Any, positive: list, negative: list, latent: dict, *, steps: int = 3, cfg: float = 4.0, seed: int = 0
) -> torch.Tensor:
    """A few steps of ComfyUI's own sampler; returns the latent."""
    import comfy.sample

    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros_like(latent["samples"])
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, zeros, disable_pbar=True, seed=seed
        )
