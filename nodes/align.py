"""Which image of the subject serves as the reference, and the transform that lays it on a generated one."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.reference.host.alignment import FORMS, MAX_DEGREES, SYMMETRIC, align_reference, choose_reference
from ..core.session.outputs import nothing
from .types import advanced, schema


class LikenessChooseReference(io.ComfyNode):
    """Images of the subject + a generated one -> the one that is most like it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessChooseReference",
            display_name="Choose Reference",
            category="likeness/reference",
            description="Of several images of the subject, takes the one that is most like a generated image, by a "
            "vision model (HiFi Tuner uses DINO ViT-S/16).",
            search_aliases=["dino", "most similar", "nearest image", "hifi tuner"],
            inputs=[
                io.Image.Input("images", tooltip="The images of the subject to choose from, as a batch."),
                io.Image.Input("picture", tooltip="The generated image, one."),
                io.ClipVision.Input(
                    "vision",
                    tooltip="The model that compares, from Load Vision Model: dino-vits16 as published, or another.",
                ),
                io.Mask.Input(
                    "masks", optional=True, tooltip="Masks of the images to choose from, one for each, passed on."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image that was taken."),
                io.Mask.Output(display_name="mask", tooltip="Its mask. Nothing behind it runs without masks."),
                io.Int.Output(display_name="index", tooltip="Its place in the batch, counted from 0."),
                io.Float.Output(
                    display_name="similarity", tooltip="How alike the two are (cosine, 1 = the same to the model)."
                ),
                io.String.Output(display_name="info", tooltip="The similarities of all images, and the model."),
            ],
        )

    @classmethod
    def execute(cls, images, picture, vision, masks=None) -> io.NodeOutput:
        choice = choose_reference(images, picture, vision, masks)
        taken = slice(choice.index, choice.index + 1)
        mask = nothing() if masks is None else masks[taken]
        return io.NodeOutput(images[taken], mask, choice.index, choice.similarity, choice.info)


class LikenessAlign(io.ComfyNode):
    """An image and its subject's mask + the mask of the same subject elsewhere -> the image, laid on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessAlign",
            display_name="Align Reference",
            category="likeness/reference",
            description="Moves, turns and scales an image so that its subject lies on that of another image (HiFi "
            "Tuner, Algorithm 4). What comes into view from outside repeats the border.",
            search_aliases=["align", "warp", "transform mask", "similarity transform", "hifi tuner"],
            inputs=[
                io.Image.Input("image", tooltip="The reference image, one."),
                io.Mask.Input("mask", tooltip="White on its subject."),
                io.Mask.Input(
                    "target_mask", tooltip="White on the subject of the generated image; the result has its size."
                ),
                *advanced(
                    io.Combo.Input(
                        "form",
                        options=list(FORMS),
                        default=SYMMETRIC,
                        tooltip="symmetric: the two masks cover each other. as printed: the paper's sum over the "
                        "reference's points alone, which shrinks it to somewhere inside the target.",
                    ),
                    io.Float.Input(
                        "max_degrees",
                        default=MAX_DEGREES,
                        min=0.0,
                        max=180.0,
                        step=1.0,
                        round=0.1,
                        tooltip="How far it may start turned. 180 finds every angle, and may lay a subject upside down "
                        "where that covers the mask a little better; 0 starts upright. For symmetric.",
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image, laid on the other."),
                io.Mask.Output(display_name="mask", tooltip="White on its subject there."),
                io.Float.Output(display_name="iou", tooltip="How well the two cover each other: 1 = exactly."),
                io.Image.Output(
                    display_name="overlay",
                    tooltip="Green where both subjects are, red where only the reference's is, blue only the other.",
                ),
                io.String.Output(display_name="matrix", tooltip="Scale, angle, and the matrix of the transform."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, target_mask, form=SYMMETRIC, max_degrees=MAX_DEGREES) -> io.NodeOutput:
        result = align_reference(image, mask, target_mask, form, max_degrees)
        return io.NodeOutput(result.image, result.mask, result.iou, result.overlay, result.matrix)


NODES = [LikenessChooseReference, LikenessAlign]
