"""Subject-driven generation and editing in stages (EZIGen): layout by text, appearance by the subject, in loops."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.ezigen import staged as published
from ..core.ezigen.host import staged as host
from ..core.ezigen.host import staged_edit as editing
from .types import Adapter, Subject, advanced, cfg_input, schema, seed_input

LOOPS = "A loop does the last part of the steps once more, from the result before. "
LARGE = " It is sampled at its own size: scale it to 512 on the short side first."


def _subject() -> list[io.Input]:
    """The inputs that both nodes have: what is sampled with."""
    return [
        io.Model.Input("model", tooltip="The plain model, which encoded the subject: SD2.1-base as published."),
        io.Vae.Input("vae", tooltip="Every loop goes through images."),
        Adapter.Input("adapter", tooltip="From Load Subject Adapter."),
        Subject.Input("subject", tooltip="From Encode Subject."),
    ]


def _numbers(cfg: float) -> list[io.Input]:
    """The inputs that both nodes have: how it is sampled."""
    return [
        seed_input("Of all noise, in every loop another."),
        io.Int.Input(
            "steps", default=published.STEPS, min=2, max=1000, tooltip="Of a whole sampling. 50 is published."
        ),
        cfg_input(cfg, f"Guidance; {cfg:g} is published."),
        io.Float.Input(
            "split_ratio",
            default=published.SPLIT_RATIO,
            min=0.01,
            max=0.99,
            step=0.05,
            round=0.001,
            tooltip="The last part of the steps, in which the subject is looked at. More is more alike and less free.",
        ),
        io.Int.Input(
            "min_loops",
            default=published.MIN_LOOPS,
            min=0,
            max=100,
            tooltip=LOOPS + "Equal numbers here and in max_loops give a fixed count, which needs no vision model.",
        ),
        io.Int.Input(
            "max_loops",
            default=published.MIN_LOOPS,
            min=0,
            max=100,
            tooltip=LOOPS + "3 to 9 is published, for which a vision model must be connected.",
        ),
        io.Float.Input(
            "threshold",
            default=published.THRESHOLD,
            min=0.0,
            max=1.0,
            step=0.005,
            round=0.0001,
            tooltip="The loops end when two images in a row are this alike to the vision model. 0.99 is published "
            "for CLIP ViT-B/32, and seldom reached.",
        ),
        io.ClipVision.Input(
            "vision",
            optional=True,
            tooltip="Says when two images are alike. Not needed for a fixed number of loops.",
        ),
    ]


class LikenessStagedSampler(io.ComfyNode):
    """MODEL + adapter + subject + prompts -> images of the subject, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessStagedSampler",
            display_name="Staged Sampler (EZIGen)",
            category="likeness/adapter",
            description="Samples a subject in stages (EZIGen): the text lays the image out, the subject appears in "
            "it, and both last steps are done again until two images in a row are alike.",
            search_aliases=["ezigen", "decoupled guidance", "subject driven"],
            inputs=[
                *_subject(),
                io.Conditioning.Input("positive", tooltip="The scene, with the subject's class in it."),
                io.Conditioning.Input("negative", tooltip=f'Of the first sampling; published: "{published.NEGATIVE}"'),
                io.Latent.Input("latent", tooltip="An empty latent: its size and number of images count."),
                *_numbers(published.CFG),
                io.Conditioning.Input(
                    "loop_negative", optional=True, tooltip="Of the loops: connect the empty prompt, as published."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image to begin the loops with, of any model, in place of the first sampling." + LARGE,
                ),
                *advanced(
                    io.Combo.Input(
                        "sampler",
                        options=list(host.SAMPLERS),
                        default=host.SAMPLER,
                        tooltip="ddpm is published; its fresh noise lets the appearance move between loops.",
                    ),
                    io.Combo.Input(
                        "scheduler",
                        options=list(host.SCHEDULERS),
                        default=host.SCHEDULER,
                        tooltip="ddim_uniform is published; the number of steps must divide 1000 then.",
                    ),
                    io.Boolean.Input(
                        "exact_noise_level",
                        default=True,
                        tooltip="Loops begin at the very level of their first step. Off: as the authors' code does it, "
                        "a little too noisy: by its formula 3 % of the image's signal are lost in every loop.",
                    ),
                    io.Boolean.Input(
                        "keep_best",
                        default=False,
                        tooltip="Of all loops the image that is most like the subject, in place of the last one.",
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The result."),
                io.Image.Output(display_name="loops", tooltip="The first sampling, and every loop after it."),
                io.Latent.Output(display_name="latent", tooltip="The result, before decoding."),
                io.String.Output(display_name="report", tooltip="How alike the loops were, and the number of steps."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        adapter,
        subject,
        positive,
        negative,
        latent,
        seed,
        steps,
        cfg,
        split_ratio,
        min_loops,
        max_loops,
        threshold,
        vision=None,
        loop_negative=None,
        image=None,
        sampler=host.SAMPLER,
        scheduler=host.SCHEDULER,
        exact_noise_level=True,
        keep_best=False,
    ) -> io.NodeOutput:
        settings = host.StagedSettings(
            seed,
            steps,
            cfg,
            split_ratio,
            published.Loops(min_loops, max_loops, threshold),
            sampler,
            scheduler,
            published_level=not exact_noise_level,
            keep_best=keep_best,
        )
        prompts = host.Prompts(positive, negative, negative if loop_negative is None else loop_negative)
        node = cls.hidden.unique_id
        models = host.StagedModels(model, vae, adapter, vision)
        found = host.sample_staged(models, subject, prompts, latent["samples"], settings, image, node)
        return io.NodeOutput(found.image, found.images, {"samples": found.latent}, found.report)


class LikenessStagedEdit(io.ComfyNode):
    """An image + mask + subject -> the image with the subject in the masked place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessStagedEdit",
            display_name="Staged Edit (EZIGen)",
            category="likeness/adapter",
            description="Puts a subject into a masked place of an image (EZIGen). The image is inverted, and "
            "outside of the mask its own latents are put back behind every step.",
            search_aliases=["ezigen", "subject swap", "inpaint subject"],
            inputs=[
                *_subject(),
                io.Conditioning.Input("positive", tooltip='What stands in the place afterwards: "a photo of a dog".'),
                io.Conditioning.Input("negative", tooltip="The empty prompt, as published; the inversion uses it too."),
                io.Image.Input("image", tooltip="The image to edit, of any proportion." + LARGE),
                io.Mask.Input("mask", tooltip="White where the subject goes. Grey mixes both."),
                *_numbers(published.EDIT_CFG),
                io.Boolean.Input(
                    "paste",
                    default=False,
                    tooltip="Put the image's own pixels back outside of the mask in the end.",
                ),
                *advanced(
                    io.Boolean.Input(
                        "exact_background",
                        default=True,
                        tooltip="Behind every step the background of its very level, and the image itself in the "
                        "end. Off: as the authors' code does it, which leaves noise in the background.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The edited image."),
                io.Image.Output(display_name="loops", tooltip="The image, and the result of every loop."),
                io.Latent.Output(display_name="latent", tooltip="The result, before decoding and pasting."),
                io.String.Output(display_name="report", tooltip="How alike the loops were."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        vae,
        adapter,
        subject,
        positive,
        negative,
        image,
        mask,
        seed,
        steps,
        cfg,
        split_ratio,
        min_loops,
        max_loops,
        threshold,
        vision=None,
        paste=False,
        exact_background=True,
    ) -> io.NodeOutput:
        settings = editing.EditSettings(
            seed,
            steps,
            cfg,
            split_ratio,
            published.Loops(min_loops, max_loops, threshold),
            published=not exact_background,
            paste=paste,
        )
        prompts, node = editing.EditPrompts(positive, negative, negative), cls.hidden.unique_id
        models = host.StagedModels(model, vae, adapter, vision)
        found = editing.edit_staged(models, subject, prompts, image, mask, settings, node)
        return io.NodeOutput(found.image, found.images, {"samples": found.latent}, found.report)


NODES = [LikenessStagedSampler, LikenessStagedEdit]
