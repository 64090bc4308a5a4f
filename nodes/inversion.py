"""Invert an image, and make guided sampling reconstruct it (DDIM inversion, null-text inversion)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.inversion import null_text as published
from ..core.inversion.ddim import ITERATIONS, LABELS
from ..core.inversion.host.ddim import invert_image, start_of
from ..core.inversion.host.null_text import prepare_reconstruction
from ..core.session.images import ImageSource
from ..core.session.outputs import loss_map, nothing
from .node import Node
from .types import LossMap, Trajectory, advanced, cfg_input, encoded_or_image, schema


class LikenessInvert(Node):
    """MODEL + image + its prompt + SIGMAS -> the noise from which sampling reconstructs the image."""

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
                io.Combo.Input(
                    "label",
                    options=list(LABELS),
                    default=LABELS[0],
                    tooltip="Noise level at which the model is evaluated in each step. published: as in null-text "
                    "inversion; current: as with flipped sigmas; fixed point: most exact, several calls per step; "
                    "midpoint: second order, for flow models and few steps.",
                ),
                *advanced(
                    io.Int.Input(
                        "iterations",
                        default=ITERATIONS,
                        min=1,
                        max=50,
                        tooltip="Additional model calls per step. Only for 'fixed point'.",
                    )
                ),
                *encoded_or_image(),
                *advanced(
                    io.Boolean.Input(
                        "check",
                        default=True,
                        optional=True,
                        tooltip="Samples the noise again without guidance and reports how closely the image comes "
                        "back: one model call more in each step.",
                    )
                ),
            ],
            outputs=[
                Trajectory.Output(display_name="trajectory", tooltip="All latents of the inversion, for Null-Text."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The latent to start from. SD1.x to SDXL: the noise; sample it without adding noise "
                    "(DisableNoise, or the output noise). Flow models: empty, with everything in the output noise.",
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels, passed through for the sampler."),
                io.Noise.Output(
                    display_name="noise",
                    tooltip="The noise to start from, for SamplerCustomAdvanced; flow models need it.",
                ),
                io.String.Output(
                    display_name="report", tooltip="How closely the image comes back without guidance, by euler."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, sigmas, label, iterations=ITERATIONS, latent=None, image=None, vae=None, check=True
    ) -> io.NodeOutput:
        source, node = ImageSource(latent, image, vae), cls.hidden.unique_id
        trajectory = invert_image(model, positive, source, sigmas, label, iterations, node, check)
        latent, noise = start_of(model, trajectory)
        return io.NodeOutput(trajectory, latent, sigmas, noise, trajectory.report())


class LikenessNullText(Node):
    """MODEL + trajectory -> negative and MODEL with which guided sampling reconstructs the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessNullText",
            display_name="Null-Text",
            category="likeness/inversion",
            description="Makes guided sampling reconstruct an inverted image: with its own negative prompt for every "
            "step (null-text inversion), or with one of two methods that need no optimization.",
            search_aliases=["null text inversion", "negative prompt inversion", "direct inversion", "pnp", "pivotal"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the image was inverted with. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The same prompt that the image was inverted with."),
                io.Conditioning.Input("negative", tooltip="The empty prompt."),
                Trajectory.Input("trajectory", tooltip="From Invert Image."),
                io.Combo.Input(
                    "method",
                    options=list(published.METHODS),
                    default=published.METHODS[0],
                    tooltip="null-text: optimizes a negative for each step. negative prompt: the prompt is its own "
                    "negative; immediate, slightly less exact. direct: the output model puts the first latent of a "
                    "batch back on the inversion's trajectory after each step; immediate and exact, for euler.",
                ),
                cfg_input(
                    published.CFG,
                    "Guidance scale that the image will be sampled with; use the same value there. Only for null-text.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(published.STARTS),
                    default=published.STARTS[0],
                    tooltip="Starting point of null-text. prompt: the prompt itself, where little is left to correct. "
                    "empty prompt: as in the paper; five times as many updates, with negatives closer to an empty "
                    "prompt.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=published.INNER_STEPS,
                    min=1,
                    max=1000,
                    tooltip="Maximum number of updates per sampling step. Only for null-text.",
                ),
                *advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=published.LEARNING_RATE,
                        min=1e-9,
                        max=1.0,
                        step=1e-3,
                        round=1e-6,
                        tooltip="Adam's learning rate at the first step. It falls by 1 % with every step.",
                    ),
                    io.Float.Input(
                        "epsilon",
                        default=published.EPSILON,
                        min=0.0,
                        max=1.0,
                        step=1e-5,
                        round=1e-7,
                        tooltip="A step ends early once its loss is below this value. The limit rises for later steps.",
                    ),
                    io.Int.Input(
                        "patience",
                        default=0,
                        min=0,
                        max=1000,
                        tooltip="A step also ends after this many updates in a row without improvement, and keeps its "
                        "best negative. 0 never does, as in the reference code.",
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative", tooltip="One negative per step, as time windows, for any sampler."
                ),
                LossMap.Output(
                    display_name="loss", tooltip="The loss of every update, for Plot Loss Graph. Only with null-text."
                ),
                io.String.Output(display_name="report", tooltip="Number of updates and losses of every step."),
                io.Model.Output(
                    display_name="model", tooltip="The model to sample with; it differs from the input only for direct."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        trajectory,
        method,
        cfg,
        start,
        inner_steps,
        learning_rate=published.LEARNING_RATE,
        epsilon=published.EPSILON,
        patience=0,
    ) -> io.NodeOutput:
        settings = published.NullTextSettings(cfg, inner_steps, learning_rate, epsilon, patience)
        node = cls.hidden.unique_id
        found = prepare_reconstruction(model, positive, negative, trajectory, method, settings, start, node)
        loss = loss_map(found.losses) if found.losses else nothing()
        return io.NodeOutput(found.negative, loss, found.report, found.model)


NODES = [LikenessInvert, LikenessNullText]
