"""What the contract suite runs: one entry for each trained thing of the pack.

A method joins by adding an Entry to METHODS: how it is trained, applied, saved and loaded on a tiny model. Everything
else, from cancelling to working beside other packs' patches, is asked of all of them alike in test_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        self.model = tiny_models.FAMILIES[self.family][0](self.model_seed)
        generator = torch.Generator().manual_seed(5)
        self.latent = {"samples": torch.randn(self.images, 4, *self.size, generator=generator)}
        self.source, self.target, self.empty = (tiny_models.prompt(self.family, seed) for seed in (1, 2, 3))


@dataclass(frozen=True)
class Entry:
    """One trained thing.

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
    from likeness.core.embedding import save_embedding

    save_embedding(folder / "subject.safetensors", embedding)
    return folder / "subject.safetensors"


def _load_embedding(path: Path):
    from likeness.core.embedding import load_embedding

    return load_embedding(path)


def _check_embedding(setting: Setting, embedding) -> None:
    from likeness.nodes.embedding import LikenessApplyEmbedding

    run_node(
        LikenessApplyEmbedding, conditioning=setting.target, embedding=embedding, scale=1.0, step=0, model=setting.model
    )


METHODS = [
    Entry(
        name="hiper",
        families=("sd1", "sd2_v", "sdxl"),
        fit=_fit_hiper,
        apply=_apply_hiper,
        tensors=lambda embedding: {str(step): rows for step, rows in embedding.rows.items()},
        save=_save_embedding,
        load=_load_embedding,
        check_base=_check_embedding,
    )
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
