"""Invert an image with a MODEL: from a node's inputs to a LIKENESS_TRAJECTORY."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...fit.runs import digest
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.describe import describe
from ...session.fingerprint import check_base, fingerprint
from ...session.images import ImageSource
from ...session.progress import Steps
from ...session.session import GuiderDenoiser, predicting
from ..ddim import Label, invert
from ..trajectory import Trajectory


def invert_image(
    model: Any,
    positive: Conditioning,
    source: ImageSource,
    sigmas: Tensor,
    label: Label,
    iterations: int,
    node_id: str | None = None,
) -> Trajectory:
    """The trajectory of an image along SIGMAS, with the prompt that describes it and without guidance."""
    single_prompt(positive, "prompt")
    check_invertible(model, sigmas)
    samples = source.encoded(model).latent
    steps = Steps(model, len(sigmas) - 1, node_id, every=10)
    latents: list[Tensor] = []

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> None:
        on_step = lambda _step, x: steps.step(x)  # noqa: E731
        latents.append(invert(denoiser, x0.float(), denoiser.context, sigmas, label, iterations, on_step).cpu())

    predicting(model, positive, samples, body)
    header = {**_origin(model, positive), "label": label}
    return Trajectory(latents[0], sigmas.detach().float().cpu(), header)


def check_invertible(model: Any, sigmas: Tensor) -> None:
    """ValueError when an image cannot be inverted along these levels with this model."""
    sampling = model.get_model_object("model_sampling")
    if not _adds_noise(sampling):
        raise ValueError(
            "This model mixes noise into the image (SD3, FLUX and other flow models), and samplers start it from "
            "pure noise, not from an inverted image: use SD1.x, SD2.x or SDXL."
        )
    if float(sigmas[-1]) > 1.01 * float(sampling.sigma_min):
        raise ValueError(
            f"The SIGMAS end at {float(sigmas[-1]):.4g}, where an image is still noisy; the inversion begins at the "
            f"clean image, at 0 or {float(sampling.sigma_min):.4g}: connect them uncut, as BasicScheduler gives them."
        )


def start_latent(model: Any, trajectory: Trajectory) -> dict[str, Tensor]:
    """The noisiest latent as a LATENT, for samplers that add no noise."""
    return {"samples": model.get_model_object("latent_format").process_out(trajectory.latents[0])}


def _adds_noise(sampling: Any) -> bool:
    ones = torch.ones(1, 1, 1, 1)
    return float(sampling.noise_scaling(torch.full((1,), 0.5), 0 * ones, ones)) == 1.0


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
