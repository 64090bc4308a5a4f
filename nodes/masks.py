"""The subject's mask by its name, and a caption of an image."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.session import folders
from ..core.vision import boxes
from ..core.vision.host.subject_masks import (
    BOX_THRESHOLD,
    TEXT_THRESHOLD,
    MaskRequest,
    captioners,
    captions,
    detectors,
    subject_masks,
)
from .types import advanced, schema


class LikenessSubjectMask(io.ComfyNode):
    """IMAGE + what it shows, in words -> MASK."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSubjectMask",
            display_name="Subject Mask",
            category="likeness/mask",
            description="Finds the subject in images by its name (Grounding DINO) and cuts it out "
            "(segment-anything). Nothing is downloaded; masks of other nodes serve as well.",
            search_aliases=["grounding dino", "segment anything", "sam", "grounded sam", "owl", "mask by text"],
            inputs=_mask_inputs(),
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White on the subject, one mask for each image."),
                io.Image.Output(
                    display_name="picture", tooltip="The images with the mask, and all boxes with their scores."
                ),
                io.String.Output(display_name="info", tooltip="What was found in each image, and what was taken."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, detector, sam, **_inputs) -> str:
        return f"{folders.state(folders.VISION, detector)} {folders.state(folders.SAMS, sam)}"

    @classmethod
    def execute(
        cls,
        image,
        subject,
        detector,
        sam,
        box_threshold=BOX_THRESHOLD,
        text_threshold=TEXT_THRESHOLD,
        choose=boxes.BEST,
    ) -> io.NodeOutput:
        finder, cutter = folders.resolve(folders.VISION, detector), folders.resolve(folders.SAMS, sam)
        found = subject_masks(image, MaskRequest(subject, box_threshold, text_threshold, choose), finder, cutter)
        return io.NodeOutput(found.mask, found.image, found.info)


class LikenessCaption(io.ComfyNode):
    """IMAGE -> what it shows, in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessCaption",
            display_name="Caption Image",
            category="likeness/mask",
            description="Describes images in words (BLIP-2, BLIP, GIT), as a prompt to invert them with. Nothing is "
            "downloaded.",
            search_aliases=["blip", "blip2", "caption", "image to text", "describe", "interrogate"],
            inputs=[
                io.Image.Input("image", tooltip="The images to describe."),
                io.Combo.Input(
                    "model",
                    options=captioners(),
                    tooltip="A transformers folder of BLIP-2, BLIP or GIT in models/likeness_vision. Press R to "
                    "refresh the list.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=30,
                    min=1,
                    max=256,
                    tooltip="Length of a caption, at most; 30 tokens are about 20 words.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="caption", tooltip="The first image's caption."),
                io.String.Output(
                    display_name="captions", is_output_list=True, tooltip="The captions of all images, as a list."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model, **_inputs) -> str:
        return folders.state(folders.VISION, model)

    @classmethod
    def execute(cls, image, model, max_tokens) -> io.NodeOutput:
        words = captions(image, folders.resolve(folders.VISION, model), max_tokens)
        return io.NodeOutput(words[0], words)


def _mask_inputs() -> list[io.Input]:
    return [
        io.Image.Input("image", tooltip="The images to look at."),
        io.String.Input(
            "subject",
            default="",
            tooltip="What to look for, in one or two plain words: 'dog', 'red mug'.",
        ),
        io.Combo.Input(
            "detector",
            options=detectors(),
            tooltip="A transformers folder of Grounding DINO (such as grounding-dino-tiny), OWL-ViT or OWLv2 in "
            "models/likeness_vision. Press R to refresh the list.",
        ),
        io.Combo.Input(
            "sam",
            options=folders.names(folders.SAMS),
            tooltip="A file of segment-anything in models/sams, such as sam_vit_b_01ec64.pth. Needs the package: pip "
            "install segment-anything.",
        ),
        io.Float.Input(
            "box_threshold",
            default=BOX_THRESHOLD,
            min=0.0,
            max=1.0,
            step=0.01,
            round=0.001,
            tooltip="Score from which on the subject counts as found. Lower it when it is missed (OWL models: to 0.1 "
            "or so), raise it when other things are taken for it.",
        ),
        *advanced(
            io.Float.Input(
                "text_threshold",
                default=TEXT_THRESHOLD,
                min=0.0,
                max=1.0,
                step=0.01,
                round=0.001,
                tooltip="Score from which on a word of the subject is written beside a box. The mask is the same.",
            ),
            io.Combo.Input(
                "choose",
                options=list(boxes.CHOICES),
                default=boxes.BEST,
                tooltip="When several are found: the one with the best score, the largest one, or all of them.",
            ),
        ),
    ]


NODES = [LikenessSubjectMask, LikenessCaption]
