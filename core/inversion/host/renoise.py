"""ReNoise inversion (see renoise.py) with a MODEL, and its replay in stock samplers and in the pack's own sampling."""

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from ...denoiser import predicted_noise
from ...fit.runs import digest
from ...prompt.conditioning import Conditioning, single_prompt
from ...session.images import ImageSource
from ...session.progress import Steps
from ...session.session import GuiderDenoiser, predicting
from ..rectify import CLOSE
from ..renoise import ReNoiseSettings, Replay, renoise
from .ddim import InvertedNoise, adds_noise, check_invertible, noise_to

REPLAY = "likeness_replay"  # key of the StoredReplay in a LATENT


@dataclass(frozen=True)
class StoredReplay(Replay):
    """A Replay with the digest of the samples that it belongs to, since stock nodes copy a LATENT's entries to the
    latents they derive from it.
    """

    samples: str


@dataclass(frozen=True)
class ReNoiseResult:
    """latent: the start of the sampling, as a LATENT with a Replay; noise: the NOISE to sample it with, empty but for
    flow models; sampler: a SAMPLER that then reconstructs the image. error: root mean square error of the
    reconstructed latent, relative to the latent's own.
    """

    latent: dict[str, Any]
    sampler: Any
    error: float
    replay: Replay
    noise: Any

    def report(self) -> str:
        levels = ", ".join(f"{float(sigma):.3g}" for sigma in self.replay.sigmas)
        kind = "ancestral steps with their noises" if len(self.replay.noises) else "steps without noise"
        return (
            f"{len(self.replay.sigmas) - 1} {kind}, noise levels {levels}\n"
            f"sampled again, the image's latent is missed by {100 * self.error:.1f} % of its size"
        )


def renoise_image(
    model: Any, positive: Conditioning, source: ImageSource, sigmas: Tensor, settings: ReNoiseSettings
) -> ReNoiseResult:
    """The noise from which these few steps would generate the image, with the prompt that describes it and without
    guidance; ValueError, before any work, for an image or levels that cannot be inverted.
    """
    single_prompt(positive, "prompt")
    check_invertible(model, sigmas)
    sampling = model.get_model_object("model_sampling")
    if not adds_noise(sampling) and (settings.ancestral or settings.correlation_weight):
        raise ValueError(
            "This is a flow model, whose ancestral samplers take another step than ReNoise inverts, and whose "
            "predictions are no noise to be decorrelated: choose the sampler euler and correlation_weight 0, or invert "
            "it with Invert Image."
        )
    samples = source.encoded(model).latent
    if samples.shape[0] != 1 or min(samples.shape[-2:]) < 4:
        raise ValueError(
            f"The image's latent is {tuple(samples.shape)}, expected one image of 4 x 4 cells or more: pick one "
            "image of the batch (ImageFromBatch), or scale it up."
        )
    levels = sigmas.detach().float().cpu().clone()
    levels[-1] = 0.0  # inversion starts at the clean image
    steps = Steps(model, len(levels) - 1)

    def body(denoiser: GuiderDenoiser, x0: Tensor) -> tuple[Tensor, Replay, float]:
        x0 = x0.float()
        start, replay = renoise(denoiser, x0, denoiser.context, levels, settings, steps.step)
        again = start
        for step, sigma in enumerate(replay.sigmas[:-1].to(x0)):
            again = replay.step(again, predicted_noise(denoiser, again, sigma, denoiser.context), step)
        error = float((again - x0).norm() / x0.norm().clamp_min(1e-6))
        return start.cpu(), Replay(replay.sigmas.cpu(), replay.noises.cpu()), error

    start, replay, error = predicting(model, positive, samples, body)
    if not bool(torch.isfinite(start).all()):
        raise ValueError(
            "The inversion ran away: what this model predicts for the image is too unlike noise to be corrected. "
            "Check that the prompt describes the image and that the VAE is the model's own, or lower kl_weight and "
            "correlation_weight, down to 0."
        )
    noise = InvertedNoise(noise_to(sampling, start, start, levels))
    start = model.get_model_object("latent_format").process_out(start)
    stored = StoredReplay(replay.sigmas, replay.noises, digest(start))
    return ReNoiseResult({"samples": start, REPLAY: stored}, replaying_sampler(replay), error, replay, noise)


def replaying_sampler(replay: Replay) -> Any:
    """ComfyUI's euler_ancestral with the recorded noises, or euler if there are none."""
    if not len(replay.noises):
        return comfy.samplers.sampler_object("euler")
    levels = replay.sigmas.tolist()

    def noise_of(sigma: Tensor, _following: Tensor) -> Tensor:
        steps = [step for step, level in enumerate(levels) if abs(level - float(sigma)) <= CLOSE * level]
        if not steps:
            raise ValueError(
                f"The sampling has the noise level {float(sigma):.4g}, the inversion had "
                f"{[round(level, 4) for level in levels]}: connect the SIGMAS of Invert For Few Steps."
            )
        return replay.noises[steps[0]][None].to(sigma)

    return comfy.samplers.ksampler("euler_ancestral", {"noise_sampler": noise_of})


def replay_of(latent: dict[str, Any]) -> Replay | None:
    """The Replay of a LATENT from an inversion; None for any other. ValueError when the latent has since been sampled,
    scaled or changed.
    """
    stored = latent.get(REPLAY)
    if stored is not None and stored.samples != digest(latent["samples"]):
        raise ValueError(
            "The latent is not the one that Invert For Few Steps gave, but was made from it: connect that node's "
            "latent as it is, not sampled, scaled or cut. To begin at another image, decode the latent and "
            "invert its image (VAE Decode, Invert For Few Steps)."
        )
    return stored
