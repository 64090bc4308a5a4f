"""What a method is given in the contract tests, and how nodes and ComfyUI's sampler are run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .. import tiny_models


@dataclass
class Setting:
    """What a method is given: a model of a family, one or more images, a prompt and its negative."""

    family: str = "sd1"
    model_seed: int = 0
    images: int = 1
    size: tuple[int, int] = (8, 8)
    shared: bool = False
    """Other tests have the same weights, as all graphs of a server share the loaded ones: nobody changes them."""

    def __post_init__(self) -> None:
        known = {**tiny_models.FAMILIES, **tiny_models.TRANSFORMERS}
        make = functools.partial(known[self.family][0], self.model_seed)
        self.model = tiny_models.shared((self.family, self.model_seed), make) if self.shared else make()
        generator = torch.Generator().manual_seed(5)
        self.channels = self.model.model.latent_format.latent_channels
        self.latent = {"samples": torch.randn(self.images, self.channels, *self.size, generator=generator)}
        self.source, self.target, self.empty = (tiny_models.prompt(self.family, seed) for seed in (1, 2, 3))

    @functools.cached_property
    def image(self) -> torch.Tensor:
        """Images of smooth colours, as large as the latents say."""
        coarse = torch.rand(self.images, 3, 4, 4, generator=torch.Generator().manual_seed(6))
        size = (8 * self.size[0], 8 * self.size[1])
        return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").movedim(1, -1)


@dataclass
class SharedSetting(Setting):
    """The same of networks whose weights nobody changes."""

    shared: bool = True


@functools.cache
def autoencoder(channels: int = 4):
    """One VAE for all settings with so many latent channels."""
    return tiny_models.kl_autoencoder() if channels == 4 else tiny_models.taesd(channels=channels)


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


def levels(setting: Setting, count: int, of: int = 50) -> torch.Tensor:
    """The first so many levels of a sampling of `of` steps, then 0."""
    import comfy.samplers

    sampling, scheduler = setting.model.get_model_object("model_sampling"), "ddim_uniform"
    if setting.family in tiny_models.TRANSFORMERS:
        scheduler = "simple"
    return torch.cat([comfy.samplers.calculate_sigmas(sampling, scheduler, of)[:count], torch.zeros(1)])
