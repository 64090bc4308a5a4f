"""Generate with the details of a reference image (HiFi Tuner, Algorithm 2)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.reference import guidance as published
from ..core.reference.host.guidance import ReferenceImage, sample_with_reference
from ..core.session.outputs import loss_map, nothing
from .types import LossMap, Trajectory, advanced, cfg_input, fraction, schema


class LikenessReferenceGuide(io.ComfyNode):
    """MODEL + prompt + noise + inverted reference + its mask -> the guided image, and what samples it again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessReferenceGuide",
            display_name="Reference Guide (HiFi Tuner)",
            category="likeness/reference",
            description="Samples an image whose subject takes up the details of an inverted reference image (HiFi "
            "Tuner): in part of the sampling the negative prompt inside the mask is optimised until the steps meet the "
            "reference.",
            search_aliases=["hifi tuner", "subject driven", "null text", "reference"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the reference was inverted with; fine-tuned or not. Not changed."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt of the image to make, with the subject's embedding in it (step-wise too).",
                ),
                io.Conditioning.Input("negative", tooltip="The empty prompt."),
                io.Noise.Input("noise", tooltip="The noise that the unguided image was sampled from (RandomNoise)."),
                Trajectory.Input(
                    "trajectory",
                    tooltip="The reference, aligned to the unguided image's subject, from Invert Image. Its noise "
                    "levels are those of the sampling.",
                ),
                io.Mask.Input("mask", tooltip="White where the aligned reference shows the subject."),
                cfg_input(published.CFG, "The guidance of the sampling."),
                io.Int.Input(
                    "inner_steps",
                    default=published.INNER_STEPS,
                    min=0,
                    max=1000,
                    tooltip="Updates in each step (J): more is nearer to the reference. 0 only transplants its layout.",
                ),
                fraction(
                    "start_percent",
                    published.START_PERCENT,
                    "Where in the sampling the reference comes in, and its latent is transplanted. 0.21 is "
                    "t_s = 40 of 50 steps; earlier keeps more of the reference.",
                ),
                fraction(
                    "end_percent",
                    published.END_PERCENT,
                    "Where it is let go. 0.82 is t_e = 10 of 50 steps; later keeps more of its details.",
                ),
                *advanced(
                    io.Float.Input(
                        "learning_rate",
                        default=published.LEARNING_RATE,
                        min=1e-5,
                        max=1.0,
                        step=1e-3,
                        round=1e-6,
                        tooltip="Adam's learning rate of the negative rows.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The finished image, for VAE Decode."),
                io.Model.Output(
                    display_name="model", tooltip="Samples the same image again: it makes the transplant on the way."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negatives that were found, for the same: one for each step, inside the mask.",
                ),
                LossMap.Output(display_name="loss", tooltip="The loss of every update, for Plot Loss Graph."),
                io.String.Output(display_name="report", tooltip="The guided steps and their losses."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        noise,
        trajectory,
        mask,
        cfg,
        inner_steps,
        start_percent,
        end_percent,
        learning_rate=published.LEARNING_RATE,
    ) -> io.NodeOutput:
        settings = published.ReferenceSettings(cfg, inner_steps, learning_rate)
        node = cls.hidden.unique_id
        reference = ReferenceImage(trajectory, mask, start_percent, end_percent)
        found = sample_with_reference(model, positive, negative, noise, reference, settings, node)
        loss = loss_map(found.losses) if found.losses else nothing()
        return io.NodeOutput({"samples": found.samples}, found.model, found.negative, loss, found.report())


NODES = [LikenessReferenceGuide]
