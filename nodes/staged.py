"""Staged subject-driven sampling and editing (EZIGen): layout from text, appearance from the subject, in loops."""

from typing import Any

from comfy_api.latest import io

from ..core.ezigen import staged as published
from ..core.ezigen.host import staged as host
from ..core.ezigen.host import staged_edit as editing
from . import inputs
from .node import Adapter, Node, Subject, output, schema

LOOPS = "number of loops. A loop repeats the last part of the steps, starting from the previous result. "
LARGE = " It is sampled at its own size, so scale its short side to 512 first."


def _subject() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The plain model that encoded the subject. EZIGen uses SD2.1-base."),
        io.Vae.Input("vae", tooltip="Encodes and decodes the images of every loop."),
        Adapter.Input("adapter", tooltip="The adapter, from Load Subject Adapter."),
        Subject.Input("subject", tooltip="The subject, from Encode Subject."),
    ]


def _numbers(cfg: float) -> list[io.Input]:
    return [
        inputs.seed("Seed of all noise; every loop draws new noise from it."),
        inputs.number("steps", published.STEPS, (2, 1000), "Steps of a full sampling. EZIGen uses 50."),
        inputs.cfg(cfg, f"Guidance scale; EZIGen uses {cfg:g}."),
        inputs.split_ratio(
            0.99,
            "Fraction of the steps, counted from the end, in which the adapter is active. Higher gives more likeness "
            "and less freedom.",
        ),
        inputs.number(
            "min_loops",
            published.MIN_LOOPS,
            (0, 100),
            "Minimum " + LOOPS + "Set it equal to max_loops for a fixed number, which needs no vision model.",
        ),
        inputs.number(
            "max_loops",
            published.MIN_LOOPS,
            (0, 100),
            "Maximum " + LOOPS + "EZIGen uses 3 to 9, which needs a vision model.",
        ),
        inputs.number(
            "threshold",
            published.THRESHOLD,
            (0.0, 1.0, 0.005, 0.0001),
            "Similarity of two consecutive images, as the vision model sees them, at which the loops end. EZIGen uses "
            "0.99 with CLIP ViT-B/32, which is seldom reached.",
        ),
        io.ClipVision.Input(
            "vision",
            optional=True,
            tooltip="Measures the similarity of consecutive images. Not needed for a fixed number of loops.",
        ),
    ]


def _stages(min_loops, max_loops, threshold, **more) -> dict[str, Any]:
    return {"loops": published.Loops(min_loops, max_loops, threshold), **more}


class LikenessStagedSampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessStagedSampler",
            display_name="Staged Sampler (EZIGen)",
            category="likeness/adapter",
            description="Samples images of a subject in stages (EZIGen): the prompt sets the layout, the last steps "
            "add the subject and are repeated until two consecutive images are similar.",
            search_aliases=["ezigen", "decoupled guidance", "subject driven"],
            inputs=[
                *_subject(),
                io.Conditioning.Input("positive", tooltip="The prompt of the scene, including the subject's class."),
                io.Conditioning.Input(
                    "negative", tooltip=f'For the first sampling. EZIGen uses "{published.NEGATIVE}"'
                ),
                io.Latent.Input("latent", tooltip="An empty latent that sets the size and the number of images."),
                *_numbers(published.CFG),
                io.Conditioning.Input(
                    "loop_negative", optional=True, tooltip="Negative prompt of the loops; EZIGen uses an empty one."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image to start the loops from, of any model, instead of the first sampling." + LARGE,
                ),
                *inputs.advanced(
                    inputs.choice(
                        "sampler",
                        host.SAMPLERS,
                        "EZIGen uses ddpm, whose fresh noise lets the appearance change between loops.",
                        default=host.SAMPLER,
                    ),
                    inputs.choice(
                        "scheduler",
                        host.SCHEDULERS,
                        "EZIGen uses ddim_uniform, for which the number of steps must divide 1000.",
                        default=host.SCHEDULER,
                    ),
                    io.Boolean.Input(
                        "exact_noise_level",
                        default=True,
                        tooltip="Starts each loop at exactly the noise level of its first step. Off: as in the "
                        "reference code, slightly too noisy; by its formula every loop loses 3 % of the image's "
                        "signal.",
                    ),
                    io.Boolean.Input(
                        "keep_best",
                        default=False,
                        tooltip="Returns the image most similar to the subject, of all loops, instead of the last one.",
                    ),
                ),
            ],
            outputs=[
                output(io.Image, "image", "The final image."),
                output(io.Image, "loops", "The image of the first sampling, and of every loop."),
                output(io.Latent, "latent", "The final latent, before decoding."),
                output(io.String, "report", "Similarities of the loops, and the number of steps."),
            ],
        )

    @classmethod
    def execute(cls, latent, image=None, exact_noise_level=True, **more) -> io.NodeOutput:
        stages = host.StagedSampling(published_level=not exact_noise_level, **_stages(**more))
        return io.NodeOutput(*host.sample_staged(stages, latent["samples"], image))


class LikenessStagedEdit(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessStagedEdit",
            display_name="Staged Edit (EZIGen)",
            category="likeness/adapter",
            description="Puts a subject into a masked area of an image (EZIGen). The image is inverted, and outside "
            "the mask its own latents are restored after every step.",
            search_aliases=["ezigen", "subject swap", "inpaint subject"],
            inputs=[
                *_subject(),
                io.Conditioning.Input("positive", tooltip='The prompt of the edited area: "a photo of a dog".'),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The empty prompt; used for the inversion too, without clip or inversion_prompt.",
                ),
                io.Image.Input("image", tooltip="The image to edit, of any aspect ratio." + LARGE),
                io.Mask.Input("mask", tooltip="White where the subject goes. Gray blends it with the image."),
                *_numbers(published.EDIT_CFG),
                io.Boolean.Input(
                    "paste", default=False, tooltip="Pastes the source image's own pixels outside the mask at the end."
                ),
                *inputs.advanced(
                    io.Boolean.Input(
                        "exact_background",
                        default=True,
                        tooltip="After every step, restores the background of exactly that noise level, and at the end "
                        "the source image itself. Off: as in the reference code, which leaves noise in the background.",
                    )
                ),
            ],
            optional=[
                io.Conditioning.Input(
                    "inversion_prompt", tooltip="Inverts the image with this prompt instead of negative."
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The model's own CLIP. Inverts the image as the reference code does: with 77 times token "
                    "7788, without positions, which no text node can encode.",
                ),
            ],
            outputs=[
                output(io.Image, "image", "The edited image."),
                output(io.Image, "loops", "The source image, and the result of every loop."),
                output(io.Latent, "latent", "The final latent, before decoding and pasting."),
                output(io.String, "report", "Similarities of the loops."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, exact_background=True, **more) -> io.NodeOutput:
        edit = editing.StagedEdit(published=not exact_background, **_stages(**more))
        return io.NodeOutput(*editing.edit_staged(edit, image, mask))
