"""Invert a picture, and make guided sampling come back to it (DDIM inversion, null-text inversion)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core import null_text as published
from ..core.host.inversion import inverted, null_text, start_latent
from ..core.inversion import ITERATIONS, LABELS
from .types import LossMap, Trajectory, advanced, schema


class LikenessInvert(io.ComfyNode):
    """MODEL + picture + its prompt + SIGMAS -> the noise that the picture would have come from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessInvert",
            display_name="Invert Picture",
            category="likeness/inversion",
            description="Finds the noise that a picture would have come from (DDIM inversion), so that sampling from "
            "it gives the picture again. Sample with the same SIGMAS, no added noise, and the euler sampler.",
            search_aliases=["ddim inversion", "unsampler", "invert", "null text"],
            inputs=[
                io.Model.Input("model", tooltip="The model to invert with, and to sample with afterwards."),
                io.Conditioning.Input("positive", tooltip="A plain description of the picture."),
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
                advanced(
                    io.Int.Input(
                        "iterations",
                        default=ITERATIONS,
                        min=1,
                        max=50,
                        tooltip="Further calls of the model in each step, for 'fixed point'.",
                    )
                ),
                io.Latent.Input("latent", optional=True, tooltip="The picture, encoded. Instead of image and VAE."),
                io.Image.Input("image", optional=True, tooltip="The picture. Needs the VAE."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the image."),
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
        trajectory = inverted(model, positive, latent, image, vae, sigmas, label, iterations, node)
        return io.NodeOutput(trajectory, start_latent(model, trajectory), sigmas)


class LikenessNullText(io.ComfyNode):
    """MODEL + trajectory -> one negative prompt for each step, with which guided sampling meets the trajectory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessNullText",
            display_name="Null-Text",
            category="likeness/inversion",
            description="Optimises the negative prompt of every step so that sampling with guidance comes back to the "
            "inverted picture (null-text inversion).",
            search_aliases=["null text inversion", "pivotal", "ddim inversion"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was inverted with. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The very prompt that the picture was inverted with."),
                io.Conditioning.Input("negative", tooltip="The empty prompt, where the optimisation starts."),
                Trajectory.Input("trajectory", tooltip="From Invert Picture."),
                io.Float.Input(
                    "cfg",
                    default=published.CFG,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The guidance that the picture will be sampled with; set the same there.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=published.INNER_STEPS,
                    min=1,
                    max=1000,
                    tooltip="Updates for each sampling step, at most.",
                ),
                advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=published.LEARNING_RATE,
                        min=1e-5,
                        max=1.0,
                        step=1e-3,
                        round=1e-6,
                        tooltip="Adam's learning rate at the first step; it falls by 1 % with every step.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "epsilon",
                        default=published.EPSILON,
                        min=0.0,
                        max=1.0,
                        step=1e-5,
                        round=1e-7,
                        tooltip="A step ends early when its loss is below this (it is allowed more later on).",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "patience",
                        default=0,
                        min=0,
                        max=1000,
                        tooltip="A step also ends after so many updates that made it worse, with the best one. 0 is "
                        "the published rule: never.",
                    )
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="negative", tooltip="One negative for each step, as time windows: for any sampler."
                ),
                LossMap.Output(display_name="loss", tooltip="The loss of every update, for Plot Loss Graph."),
                io.String.Output(display_name="report", tooltip="Updates and losses of every step."),
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
        cfg,
        inner_steps,
        learning_rate=published.LEARNING_RATE,
        epsilon=published.EPSILON,
        patience=0,
    ) -> io.NodeOutput:
        settings = published.NullTextSettings(cfg, inner_steps, learning_rate, epsilon, patience)
        found = null_text(model, positive, negative, trajectory, settings, cls.hidden.unique_id)
        return io.NodeOutput(found.conditioning, {"loss": found.losses}, found.report())


NODES = [LikenessInvert, LikenessNullText]
