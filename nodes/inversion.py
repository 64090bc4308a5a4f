"""Invert an image, and make guided sampling come back to it (DDIM inversion, null-text inversion)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.inversion import null_text as published
from ..core.inversion.ddim import ITERATIONS, LABELS
from ..core.inversion.host.ddim import invert_image, start_latent
from ..core.inversion.host.null_text import prepare_reconstruction
from ..core.session.images import ImageSource
from ..core.session.outputs import loss_map, nothing
from .types import LossMap, Trajectory, advanced, cfg_input, encoded_or_image, schema


class LikenessInvert(io.ComfyNode):
    """MODEL + image + its prompt + SIGMAS -> the noise that the image would have come from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessInvert",
            display_name="Invert Image",
            category="likeness/inversion",
            description="Finds the noise that an image would have come from (DDIM inversion), so that sampling from "
            "it gives the image again. Sample with the same SIGMAS, no added noise, and the euler sampler.",
            search_aliases=["ddim inversion", "unsampler", "invert", "null text"],
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with, and to sample with afterwards."),
                io.Conditioning.Input("positive", tooltip="A plain description of the image."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The noise levels of the sampling, from BasicScheduler: ddim_uniform with 50 steps is "
                    "usual.",
                ),
                io.Combo.Input(
                    "label",
                    options=list(LABELS),
                    default=LABELS[0],
                    tooltip="At which noise level the model is asked in each step. published: as null-text inversion "
                    "does it; current: as flipped sigmas do it; fixed point: most exact, and several calls a step.",
                ),
                *advanced(
                    io.Int.Input(
                        "iterations",
                        default=ITERATIONS,
                        min=1,
                        max=50,
                        tooltip="Further calls of the model in each step, for 'fixed point'.",
                    )
                ),
                *encoded_or_image(),
            ],
            outputs=[
                Trajectory.Output(display_name="trajectory", tooltip="All latents on the way, for Null-Text."),
                io.Latent.Output(
                    display_name="latent", tooltip="The noise. Sample it without adding noise (DisableNoise)."
                ),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels, passed on for the sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, sigmas, label, iterations=ITERATIONS, latent=None, image=None, vae=None
    ) -> io.NodeOutput:
        node = cls.hidden.unique_id
        trajectory = invert_image(model, positive, ImageSource(latent, image, vae), sigmas, label, iterations, node)
        return io.NodeOutput(trajectory, start_latent(model, trajectory), sigmas)


class LikenessNullText(io.ComfyNode):
    """MODEL + trajectory -> negative and MODEL with which guided sampling comes back to the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessNullText",
            display_name="Null-Text",
            category="likeness/inversion",
            description="Lets sampling with guidance come back to an inverted image: by a negative prompt of its own "
            "for every step (null-text inversion), or by two ways that need no optimisation.",
            search_aliases=["null text inversion", "negative prompt inversion", "direct inversion", "pnp", "pivotal"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the image was inverted with. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The very prompt that the image was inverted with."),
                io.Conditioning.Input("negative", tooltip="The empty prompt."),
                Trajectory.Input("trajectory", tooltip="From Invert Image."),
                io.Combo.Input(
                    "method",
                    options=list(published.METHODS),
                    default=published.METHODS[0],
                    tooltip="null-text: optimises a negative for each step. negative prompt: the prompt is its own "
                    "negative, at once, a little less exact. direct: the output model puts the first latent back on "
                    "the inverted image after each step, at once and exact, for euler.",
                ),
                cfg_input(
                    published.CFG,
                    "The guidance that the image will be sampled with; set the same there. For null-text.",
                ),
                io.Combo.Input(
                    "start",
                    options=list(published.STARTS),
                    default=published.STARTS[0],
                    tooltip="Where null-text begins. prompt: at the prompt itself, where little is left to correct. "
                    "empty prompt: as published; five times as many updates, and negatives nearer to an empty prompt.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=published.INNER_STEPS,
                    min=1,
                    max=1000,
                    tooltip="Updates for each sampling step, at most. For null-text.",
                ),
                *advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=published.LEARNING_RATE,
                        min=1e-5,
                        max=1.0,
                        step=1e-3,
                        round=1e-6,
                        tooltip="Adam's learning rate at the first step; it falls by 1 % with every step.",
                    ),
                    io.Float.Input(
                        "epsilon",
                        default=published.EPSILON,
                        min=0.0,
                        max=1.0,
                        step=1e-5,
                        round=1e-7,
                        tooltip="A step ends early when its loss is below this (it is allowed more later on).",
                    ),
                    io.Int.Input(
                        "patience",
                        default=0,
                        min=0,
                        max=1000,
                        tooltip="A step also ends after so many updates that made it worse, with the best one. 0 is "
                        "the published rule: never.",
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative", tooltip="One negative for each step, as time windows: for any sampler."
                ),
                LossMap.Output(
                    display_name="loss", tooltip="The loss of every update, for Plot Loss Graph. Only of null-text."
                ),
                io.String.Output(display_name="report", tooltip="Updates and losses of every step."),
                io.Model.Output(
                    display_name="model", tooltip="The model to sample with. Another than the input only for direct."
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
