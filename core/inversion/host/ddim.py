"""Invert an image with a MODEL: from a node's inputs to a LIKENESS_TRAJECTORY."""

from dataclasses import dataclass
from typing import Any

import torch
from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise
from torch import Tensor

from ...fit.runs import digest
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.describe import describe
from ...session.fingerprint import check_base, fingerprint
from ...session.images import ImageSource
from ...session.progress import Steps
from ...session.sampling import adds_noise, noisy_start
from ...session.session import GuiderDenoiser, predicting
from ..ddim import Label, invert, reconstruct
from ..trajectory import Trajectory


def invert_image(
    model: Any,
    positive: Conditioning,
    source: ImageSource,
    sigmas: Tensor,
    label: Label,
    iterations: int,
    check: bool = False,
) -> Trajectory:
    """The trajectory of an image along SIGMAS, with the prompt that describes it and without guidance. check: measure
    how closely Euler steps reconstruct the image, for one evaluation more in each step.
    """
    single_prompt(positive, "prompt")
    check_invertible(model, sigmas)
    samples = source.encoded(model).latent
    steps = Steps(model, len(sigmas) - 1, every=10)
    header = {**_origin(model, positive), "label": label}

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> Trajectory:
        x0, context = x0.float(), denoiser.context
        latents = invert(denoiser, x0, context, sigmas, label, iterations, steps.step)
        error = None
        if check:
            missed = reconstruct(denoiser, latents[0], context, sigmas) - x0
            error = float(missed.norm() / x0.norm().clamp_min(1e-6))
        return Trajectory(latents.cpu(), sigmas.detach().float().cpu(), header, error)

    return predicting(model, positive, samples, body)


def check_invertible(model: Any, sigmas: Tensor) -> None:
    """ValueError when an image cannot be inverted along these levels with this model."""
    sampling = model.get_model_object("model_sampling")
    if float(sigmas[-1]) > 1.01 * float(sampling.sigma_min):
        raise ValueError(
            f"The SIGMAS end at {float(sigmas[-1]):.4g}, where an image is still noisy; the inversion begins at the "
            f"clean image, at 0 or {float(sampling.sigma_min):.4g}: connect them uncut, as BasicScheduler gives them."
        )


@dataclass(frozen=True, eq=False)
class InvertedNoise:
    """A NOISE: the noisiest latent as samplers take it, before they scale it to their first level."""

    noise: Tensor
    seed: int = 0

    def generate_noise(self, latent: dict[str, Tensor]) -> Tensor:
        shape = tuple(latent["samples"].shape)
        if shape[1:] != tuple(self.noise.shape[1:]) or shape[0] % len(self.noise):
            raise ValueError(
                f"The latent to sample is {shape}, the inverted noise {tuple(self.noise.shape)}: connect the latent "
                "that Invert Image gives with it."
            )
        return self.noise.repeat(shape[0] // len(self.noise), *[1] * (self.noise.ndim - 1))  # an image and its edit


def start_of(model: Any, trajectory: Trajectory) -> tuple[dict[str, Tensor], Any]:
    """The LATENT and the NOISE from which a sampler starts at the noisiest latent.

    Where a latent keeps its size under noise (eps and v models), the LATENT is the noisiest one and the NOISE is empty.
    Flow models scale the latent down, to 0 at full noise: the LATENT is empty, and the NOISE holds everything.
    """
    start, sampling = trajectory.latents[0], model.get_model_object("model_sampling")
    if adds_noise(sampling):
        return {"samples": model.get_model_object("latent_format").process_out(start)}, Noise_EmptyNoise()
    empty = torch.zeros_like(start)
    return {"samples": empty}, InvertedNoise(noise_to(sampling, start, empty, trajectory.sigmas))


def noise_to(sampling: Any, start: Tensor, latent: Tensor, sigmas: Tensor) -> Tensor:
    """The noise that samplers scale and add to a latent to begin at `start`, all in the model's own space."""
    none = torch.zeros_like(latent)
    scale = float(noisy_start(sampling, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), sigmas))
    return (start - noisy_start(sampling, none, latent, sigmas)) / scale


def _origin(model: Any, positive: Conditioning) -> dict[str, Any]:
    """Identifies a trajectory's model, with its LoRAs and its sampling, and the prompt's embeddings."""
    context, options = positive[0]
    return {
        "base": fingerprint(model),
        "patches": digest([describe(model.patches), describe(model.get_model_object("model_sampling"))]),
        "prompt": digest([context, options.get("pooled_output")]),
    }


def check_trajectory(model: Any, positive: Conditioning, trajectory: Trajectory) -> None:
    """ValueError when a trajectory belongs to another model or prompt."""
    check_base(trajectory.header.get("base", {}), model)
    single_prompt(positive, "prompt")
    origin = _origin(model, positive)
    if any(trajectory.header.get(part) != origin[part] for part in ("base", "patches")):
        raise ValueError(
            "The trajectory was made with another model (another checkpoint, LoRA or model sampling): connect the same "
            "model that the image was inverted with."
        )
    if trajectory.header.get("prompt") != origin["prompt"]:
        raise ValueError(
            "The trajectory was made with another prompt: connect the same prompt that the image was inverted with."
        )
