"""Choose and align a reference image, and generate with its details (HiFi Tuner, Algorithms 4 and 2)."""

from comfy_api.latest import io

from ..core.reference import guidance as published
from ..core.reference.host.alignment import FORMS, MAX_DEGREES, SYMMETRIC, align_reference, choose_reference
from ..core.reference.host.guidance import sample_with_reference
from . import inputs
from .node import LossMap, Node, Trajectory, output, schema


class LikenessChooseReference(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessChooseReference",
            display_name="Choose Reference",
            category="likeness/reference",
            description="Chooses the subject image that is most similar to a generated image, as judged by a vision "
            "model (HiFi Tuner uses DINO ViT-S/16).",
            search_aliases=["dino", "most similar", "nearest image", "hifi tuner"],
            inputs=[
                io.Image.Input("images", tooltip="A batch of subject images to choose from."),
                io.Image.Input("picture", tooltip="One generated image."),
                io.ClipVision.Input(
                    "vision",
                    tooltip="The vision model for the comparison, from Load Vision Model. The paper uses dino-vits16; "
                    "others work too.",
                ),
            ],
            optional=[io.Mask.Input("masks", tooltip="One mask per image; the chosen image's mask is passed through.")],
            outputs=[
                output(io.Image, "image", "The chosen image."),
                output(io.Mask, "mask", "Its mask. Nodes connected here do not run without masks."),
                output(io.Int, "index", "Index of the chosen image in the batch, counted from 0."),
                output(io.Float, "similarity", "Cosine similarity of the two (1 = identical to the model)."),
                output(io.String, "info", "The similarities of all images, and the vision model."),
            ],
        )

    @classmethod
    def execute(cls, images, picture, vision, masks=None) -> io.NodeOutput:
        index, *rest = choose_reference(images, picture, vision, masks)
        taken = slice(index, index + 1)
        return io.NodeOutput(images[taken], None if masks is None else masks[taken], index, *rest)


class LikenessAlign(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessAlign",
            display_name="Align Reference",
            category="likeness/reference",
            description="Translates, rotates and scales an image so that its subject covers the subject of another "
            "image (HiFi Tuner, Algorithm 4). Areas from outside the image repeat its border.",
            search_aliases=["align", "warp", "transform mask", "similarity transform", "hifi tuner"],
            inputs=[
                io.Image.Input("image", tooltip="One reference image."),
                io.Mask.Input("mask", tooltip="White on the subject of the reference image."),
                io.Mask.Input(
                    "target_mask", tooltip="White on the subject of the generated image; the result has its size."
                ),
                *inputs.advanced(
                    inputs.choice(
                        "form",
                        FORMS,
                        "symmetric: each mask has to cover the other. as printed: the paper's sum over the "
                        "reference's points only, which shrinks the reference to somewhere inside the target.",
                    ),
                    inputs.number(
                        "max_degrees",
                        MAX_DEGREES,
                        (0.0, 180.0, 1.0, 0.1),
                        "Largest initial rotation in degrees. 180 finds any angle but may turn the subject "
                        "upside down if that covers the mask slightly better; 0 starts upright. Only for symmetric.",
                    ),
                ),
            ],
            outputs=[
                output(io.Image, "image", "The aligned image."),
                output(io.Mask, "mask", "White on the subject of the aligned image."),
                output(io.Float, "iou", "Overlap of the two masks (1 = exact)."),
                output(
                    io.Image,
                    "overlay",
                    "Green for both subjects, red for the reference only, blue for the target only.",
                ),
                output(io.String, "matrix", "Scale, angle and matrix of the transform."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, target_mask, form=SYMMETRIC, max_degrees=MAX_DEGREES) -> io.NodeOutput:
        return io.NodeOutput(*align_reference(image, mask, target_mask, form, max_degrees))


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
                    inputs.token_rate(
                        published.LEARNING_RATE, "Adam's learning rate for the negative token embeddings.", 1e-3
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
        how, percents = published.ReferenceSettings(**settings), (start_percent, end_percent)
        given = model, positive, negative, noise, trajectory, mask, percents
        samples, *rest = sample_with_reference(*given, how)
        return io.NodeOutput({"samples": samples}, *rest)
