"""Choose the subject image that serves as the reference, and align it with a generated image."""

from comfy_api.latest import io

from ..core.reference.host.alignment import FORMS, MAX_DEGREES, SYMMETRIC, align_reference, choose_reference
from ..core.session.outputs import nothing
from . import inputs
from .node import Node, output, schema


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
        choice = choose_reference(images, picture, vision, masks)
        taken = slice(choice.index, choice.index + 1)
        return io.NodeOutput(images[taken], nothing() if masks is None else masks[taken], *choice)


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
