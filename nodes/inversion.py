"""Invert an image, and make guided sampling reconstruct it (DDIM and null-text inversion, ReNoise)."""

from comfy_api.latest import io

from ..core.inversion import null_text, renoise
from ..core.inversion.ddim import ITERATIONS, LABELS
from ..core.inversion.host.ddim import invert_image, start_of
from ..core.inversion.host.null_text import prepare_reconstruction
from ..core.inversion.host.renoise import renoise_image
from ..core.session.images import ImageSource
from . import inputs
from .node import LossMap, Node, Trajectory, build, output, schema

ANCESTRAL, PLAIN = SAMPLERS = ("euler_ancestral", "euler")


class LikenessInvert(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessInvert",
            display_name="Invert Image",
            category="likeness/inversion",
            description="Finds the noise from which sampling reconstructs an image (DDIM inversion, or the flow ODE). "
            "Sample latent, noise and SIGMAS of this node with the euler sampler.",
            search_aliases=["ddim inversion", "unsampler", "invert", "null text", "rf inversion", "fireflow"],
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with, and to sample with afterwards."),
                io.Conditioning.Input("positive", tooltip="A plain description of the image."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels of the sampling, from BasicScheduler. ddim_uniform with 50 steps is usual.",
                ),
                inputs.choice(
                    "label",
                    LABELS,
                    "Noise level at which the model is evaluated in each step. published: as in null-text inversion; "
                    "current: as with flipped sigmas; fixed point: most exact, several calls per step; midpoint: "
                    "second order, for flow models and few steps.",
                ),
                *inputs.advanced(
                    inputs.count(
                        "iterations", ITERATIONS, 50, "Additional model calls per step. Only for 'fixed point'."
                    )
                ),
            ],
            optional=[
                *inputs.encoded_or_image(),
                *inputs.advanced(
                    io.Boolean.Input(
                        "check",
                        default=True,
                        tooltip="Samples the noise again without guidance and reports how closely the image comes "
                        "back: one model call more in each step.",
                    )
                ),
            ],
            outputs=[
                output(Trajectory, "trajectory", "All latents of the inversion, for Null-Text."),
                output(
                    io.Latent,
                    "latent",
                    "The latent to start from. SD1.x to SDXL: the noise; sample it without adding noise "
                    "(DisableNoise, or the output noise). Flow models: empty, with everything in the output noise.",
                ),
                output(io.Sigmas, "sigmas", "The noise levels, passed through for the sampler."),
                output(io.Noise, "noise", "The noise to start from, for SamplerCustomAdvanced; flow models need it."),
                output(io.String, "report", "How closely the image comes back without guidance, by euler."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, sigmas, label, iterations=ITERATIONS, check=True, **more) -> io.NodeOutput:
        source = ImageSource(**more)
        trajectory = invert_image(model, positive, source, sigmas, label, iterations, check)
        latent, noise = start_of(model, trajectory)
        return io.NodeOutput(trajectory, latent, sigmas, noise, trajectory.report())


class LikenessNullText(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessNullText",
            display_name="Null-Text",
            category="likeness/inversion",
            description="Makes guided sampling reconstruct an inverted image: with its own negative prompt for every "
            "step (null-text inversion), or with one of three methods that need no optimization.",
            search_aliases=[
                "null text inversion",
                "negative prompt inversion",
                "direct inversion",
                "directedit",
                "pnp",
                "pivotal",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the image was inverted with. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The same prompt that the image was inverted with."),
                io.Conditioning.Input("negative", tooltip="The empty prompt."),
                Trajectory.Input("trajectory", tooltip="From Invert Image."),
                inputs.choice(
                    "method",
                    null_text.METHODS,
                    "null-text: optimizes a negative for each step. negative prompt: the prompt is its own negative; "
                    "immediate, slightly less exact. direct: the output model puts the first latent of a batch back "
                    "on the inversion's trajectory after each step; immediate and exact, for euler. direct edit: "
                    "direct, and the model also sees the edits as the inversion saw the image (DirectEdit).",
                ),
                inputs.cfg(
                    null_text.CFG,
                    "Guidance scale that the image will be sampled with; use the same value there. Only for null-text.",
                ),
                inputs.choice(
                    "start",
                    null_text.STARTS,
                    "Starting point of null-text. prompt: the prompt itself, where little is left to correct. empty "
                    "prompt: as in the paper; five times as many updates, with negatives closer to an empty prompt.",
                ),
                inputs.inner_steps(
                    null_text.INNER_STEPS, "Maximum number of updates per sampling step. Only for null-text."
                ),
                *inputs.advanced(
                    inputs.token_rate(
                        null_text.LEARNING_RATE,
                        "Adam's learning rate at the first step. It falls by 1 % with every step.",
                        1e-3,
                    ),
                    inputs.number(
                        "epsilon",
                        null_text.EPSILON,
                        (0.0, 1.0, 1e-5, 1e-7),
                        "A step ends early once its loss is below this value. The limit rises for later steps.",
                    ),
                    inputs.number(
                        "patience",
                        0,
                        (0, 1000),
                        "A step also ends after this many updates in a row without improvement, and keeps its "
                        "best negative. 0 never does, as in the reference code.",
                    ),
                ),
            ],
            outputs=[
                output(io.Conditioning, "negative", "One negative per step, as time windows, for any sampler."),
                output(LossMap, "loss", "The loss of every update, for Plot Loss Graph. Only with null-text."),
                output(io.String, "report", "Number of updates and losses of every step."),
                output(
                    io.Model,
                    "model",
                    "The model to sample with; it differs from the input only for direct and direct edit.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, negative, trajectory, method, start, **settings) -> io.NodeOutput:
        how = null_text.NullTextSettings(**settings)
        return io.NodeOutput(*prepare_reconstruction(model, positive, negative, trajectory, method, how, start))


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
                    default=renoise.SEED,
                ),
                *_renoise_inputs(),
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
    def execute(cls, model, positive, sigmas, sampler, **more) -> io.NodeOutput:
        more["ancestral"] = sampler == ANCESTRAL
        source, how = build(more, ImageSource, renoise.ReNoiseSettings)
        found = renoise_image(model, positive, source, sigmas, how)
        return io.NodeOutput(found.latent, found.sampler, found.replay.sigmas, found.report(), found.noise)


def _renoise_inputs() -> list[io.Input]:
    return inputs.advanced(
        inputs.count(
            "iterations",
            renoise.ITERATIONS,
            100,
            "Number of iterations per step, each from the latent that the previous one found.",
        ),
        inputs.count("averaged", renoise.AVERAGED, 100, "Number of last iterations whose predicted noise is averaged."),
        inputs.number(
            "kl_weight",
            renoise.KL_WEIGHT,
            (0.0, 10.0, 0.005, 1e-6),
            "Strength of the correction that makes patches of the predicted noise look like noise.",
        ),
        inputs.number(
            "correlation_weight",
            renoise.CORRELATION_WEIGHT,
            (0.0, 1000.0, 1.0, 1e-4),
            "Strength of the correction that decorrelates neighbors in the predicted noise (SD-turbo: 0).",
        ),
    )
