"""Invert an image for few-step sampling (ReNoise)."""

from comfy_api.latest import io

from ..core.inversion import renoise as published
from ..core.inversion.host.renoise import renoise_image
from ..core.session.images import ImageSource
from . import inputs
from .node import Node, output, schema

ANCESTRAL, PLAIN = SAMPLERS = ("euler_ancestral", "euler")


class LikenessRenoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessRenoise",
            display_name="Invert For Few Steps (ReNoise)",
            category="likeness/inversion",
            description="Finds the noise from which a turbo model reconstructs an image in a few steps (ReNoise), and "
            "the noise that an ancestral sampler has to add on the way. Sample with this sampler, these SIGMAS and no "
            "other noise, or edit with Optimize LoRA.",
            search_aliases=["renoise", "turbo inversion", "siso", "invert", "unsampler", "ddim inversion"],
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with, and to sample with afterwards."),
                io.Conditioning.Input("positive", tooltip="A plain description of the image: 'a photo of a dog'."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels of the sampling. The reference code's are BasicScheduler with simple and 4 "
                    "steps, then low_sigmas of SplitSigmas at 1. Fewer steps keep more of the image.",
                ),
                inputs.choice(
                    "sampler",
                    SAMPLERS,
                    "euler_ancestral: the reference code's for SDXL-turbo. euler: the reference code's for SD-turbo, "
                    "and for flow models, with correlation_weight 0.",
                ),
                inputs.seed(
                    "Seed of the noise that the sampler adds, and of the randomness in the correction.",
                    default=published.SEED,
                ),
                *_advanced_inputs(),
            ],
            optional=inputs.encoded_or_image(),
            outputs=[
                output(
                    io.Latent,
                    "latent",
                    "The latent to start sampling from. Sample it with this node's noise, or connect it to Optimize "
                    "LoRA.",
                ),
                output(io.Sampler, "sampler", "The sampler, which adds exactly the noise that was found."),
                output(io.Sigmas, "sigmas", "The noise levels, for the sampler or Optimize LoRA."),
                output(io.String, "report", "The steps, and how well they match the image."),
                output(
                    io.Noise,
                    "noise",
                    "The noise to sample the latent with: none (as DisableNoise), but what flow models need.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, sigmas, sampler, latent=None, image=None, vae=None, **settings) -> io.NodeOutput:
        how = published.ReNoiseSettings(sampler == ANCESTRAL, **settings)
        found = renoise_image(model, positive, ImageSource(latent, image, vae), sigmas, how)
        return io.NodeOutput(found.latent, found.sampler, found.replay.sigmas, found.report(), found.noise)


def _advanced_inputs() -> list[io.Input]:
    return inputs.advanced(
        inputs.count(
            "iterations",
            published.ITERATIONS,
            100,
            "Number of iterations per step, each from the latent that the previous one found.",
        ),
        inputs.count(
            "averaged", published.AVERAGED, 100, "Number of last iterations whose predicted noise is averaged."
        ),
        inputs.number(
            "kl_weight",
            published.KL_WEIGHT,
            (0.0, 10.0, 0.005, 1e-6),
            "Strength of the correction that makes patches of the predicted noise look like noise.",
        ),
        inputs.number(
            "correlation_weight",
            published.CORRELATION_WEIGHT,
            (0.0, 1000.0, 1.0, 1e-4),
            "Strength of the correction that decorrelates neighbors in the predicted noise (SD-turbo: 0).",
        ),
    )
