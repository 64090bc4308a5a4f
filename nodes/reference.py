"""Generate with the details of a reference image (HiFi Tuner, Algorithm 2)."""

from comfy_api.latest import io

from ..core.reference import guidance as published
from ..core.reference.host.guidance import ReferenceImage, sample_with_reference
from ..core.session.outputs import loss_map, nothing
from . import inputs
from .node import LossMap, Node, Trajectory, output, schema


class LikenessReferenceGuide(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessReferenceGuide",
            display_name="Reference Guide (HiFi Tuner)",
            category="likeness/reference",
            description="Samples an image whose subject takes on the details of an inverted reference image (HiFi "
            "Tuner). In part of the sampling, the negative prompt inside the mask is optimized until the steps match "
            "the reference.",
            search_aliases=["hifi tuner", "subject driven", "null text", "reference"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that the reference was inverted with; fine-tuned or not. Not changed."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt of the new image, with the subject embedding in it (or a step-wise one).",
                ),
                io.Conditioning.Input("negative", tooltip="The empty prompt."),
                io.Noise.Input("noise", tooltip="The noise that the unguided image was sampled from (RandomNoise)."),
                Trajectory.Input(
                    "trajectory",
                    tooltip="The reference, aligned with the subject of the unguided image, from Invert Image. Its "
                    "noise levels are used for the sampling.",
                ),
                io.Mask.Input("mask", tooltip="White on the subject of the aligned reference."),
                inputs.cfg(published.CFG, "Guidance scale of the sampling."),
                inputs.inner_steps(
                    published.INNER_STEPS,
                    "Updates per step (J). More come closer to the reference; 0 only transplants its layout.",
                    least=0,
                ),
                inputs.fraction(
                    "start_percent",
                    published.START_PERCENT,
                    "Point in the sampling at which the reference starts to guide and its latent is transplanted. "
                    "0.21 is t_s = 40 of 50 steps; earlier keeps more of the reference.",
                ),
                inputs.fraction(
                    "end_percent",
                    published.END_PERCENT,
                    "Point in the sampling at which the reference stops guiding. 0.82 is t_e = 10 of 50 steps; later "
                    "keeps more of its details.",
                ),
                *inputs.advanced(
                    inputs.number(
                        "learning_rate",
                        published.LEARNING_RATE,
                        (1e-9, 1.0, 1e-3, 1e-6),
                        "Adam's learning rate for the negative token embeddings.",
                    )
                ),
            ],
            outputs=[
                output(io.Latent, "latent", "The latent of the finished image, for VAE Decode."),
                output(io.Model, "model", "The model with the transplant, to sample the same image again."),
                output(
                    io.Conditioning,
                    "negative",
                    "The optimized negatives, one per step inside the mask, to sample the same image again.",
                ),
                output(LossMap, "loss", "The loss of every update, for Plot Loss Graph."),
                output(io.String, "report", "The guided steps and their losses."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, noise, trajectory, mask, start_percent, end_percent, **settings
    ) -> io.NodeOutput:
        reference = ReferenceImage(trajectory, mask, start_percent, end_percent)
        how = published.ReferenceSettings(**settings)
        found = sample_with_reference(model, positive, negative, noise, reference, how)
        loss = loss_map(found.losses) if found.losses else nothing()
        return io.NodeOutput({"samples": found.samples}, found.model, found.negative, loss, found.report())
