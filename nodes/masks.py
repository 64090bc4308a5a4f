"""Mask a subject by its name, and caption images."""

from comfy_api.latest import io

from ..core.session import folders
from ..core.vision import boxes
from ..core.vision.host.extras.caption import is_captioner
from ..core.vision.host.extras.grounding import is_detector
from ..core.vision.host.subject_masks import BOX_THRESHOLD, TEXT_THRESHOLD, captions, subject_masks
from ..core.vision.host.vision import vision_names
from . import inputs
from .node import Node, output, schema


class LikenessSubjectMask(Node, files={"detector": folders.VISION, "sam": folders.SAMS}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSubjectMask",
            display_name="Subject Mask",
            category="likeness/mask",
            description="Finds the subject in images by name (Grounding DINO) and segments it (segment-anything). "
            "Nothing is downloaded; masks from other nodes work as well.",
            search_aliases=["grounding dino", "segment anything", "sam", "grounded sam", "owl", "mask by text"],
            inputs=_mask_inputs(),
            outputs=[
                output(io.Mask, "mask", "White on the subject, one mask per image."),
                output(io.Image, "picture", "The images with the mask, the boxes and their scores."),
                output(io.String, "info", "The detections in each image, and which were used."),
            ],
        )

    @classmethod
    def execute(cls, image, detector, sam, **request) -> io.NodeOutput:
        finder, cutter = folders.resolve(folders.VISION, detector), folders.resolve(folders.SAMS, sam)
        return io.NodeOutput(*subject_masks(image, finder, cutter, **request))


class LikenessCaption(Node, files={"model": folders.VISION}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessCaption",
            display_name="Caption Image",
            category="likeness/mask",
            description="Captions images (BLIP-2, BLIP, GIT), to use as the prompt of an inversion. Nothing is "
            "downloaded.",
            search_aliases=["blip", "blip2", "caption", "image to text", "describe", "interrogate"],
            inputs=[
                io.Image.Input("image", tooltip="The images to caption."),
                io.Combo.Input(
                    "model",
                    options=vision_names(is_captioner),
                    tooltip="A transformers folder of BLIP-2, BLIP or GIT in models/likeness_vision. Press R to "
                    "refresh the list.",
                ),
                inputs.count("max_tokens", 30, 256, "Maximum length of a caption; 30 tokens are about 20 words."),
            ],
            outputs=[
                output(io.String, "caption", "The caption of the first image."),
                output(io.String, "captions", "The captions of all images, as a list.", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, image, model, max_tokens) -> io.NodeOutput:
        words = captions(image, folders.resolve(folders.VISION, model), max_tokens)
        return io.NodeOutput(words[0], words)


def _mask_inputs() -> list[io.Input]:
    return [
        io.Image.Input("image", tooltip="The images to search."),
        io.String.Input(
            "subject",
            default="",
            tooltip="The subject to look for, in one or two plain words: 'dog', 'red mug'.",
        ),
        io.Combo.Input(
            "detector",
            options=vision_names(is_detector),
            tooltip="A transformers folder of Grounding DINO (such as grounding-dino-tiny), OWL-ViT or OWLv2 in "
            "models/likeness_vision. Press R to refresh the list.",
        ),
        io.Combo.Input(
            "sam",
            options=folders.names(folders.SAMS),
            tooltip="A segment-anything file in models/sams, such as sam_vit_b_01ec64.pth. Needs a package: pip "
            "install segment-anything.",
        ),
        inputs.number(
            "box_threshold",
            BOX_THRESHOLD,
            (0.0, 1.0, 0.01, 0.001),
            "Minimum score for the subject to count as found. Lower it if the subject is missed (about 0.1 for OWL "
            "models), raise it if other things are mistaken for it.",
        ),
        *inputs.advanced(
            inputs.number(
                "text_threshold",
                TEXT_THRESHOLD,
                (0.0, 1.0, 0.01, 0.001),
                "Minimum score for a word of the subject to be shown beside a box. The mask is the same.",
            ),
            inputs.choice(
                "choose",
                boxes.CHOICES,
                "If several are found: the one with the best score, the largest one, or all of them.",
            ),
        ),
    ]
