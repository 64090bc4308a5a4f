"""Load a vision model, and score images for identity, text and background."""

from comfy_api.latest import io, ui

from ..core.session import folders
from ..core.session.inputs import Names
from ..core.session.progress import seconds_of
from ..core.vision.host import scoring
from ..core.vision.host.sheets import score_sheet
from ..core.vision.host.vision import load_vision, vision_names
from . import inputs
from .node import Node, output, schema

NO_LPIPS = "none"


class LikenessLoadVision(Node, files={"name": folders.VISION}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadVision",
            display_name="Load Vision Model",
            category="likeness/score",
            description="Loads DINOv2, CLIP, SigLIP and other vision models from models/likeness_vision: a "
            "transformers folder or an open_clip safetensors file. Nothing is downloaded.",
            search_aliases=["dino", "dinov2", "clip vision", "siglip", "open_clip"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=vision_names(),
                    tooltip="A folder with config.json and model.safetensors, or an open_clip file named like "
                    "ViT-B-32__mine.safetensors, in models/likeness_vision. Press R to refresh the list.",
                )
            ],
            outputs=[
                output(
                    io.ClipVision,
                    "vision",
                    "The vision model, for Score Likeness and any node that takes a CLIP_VISION.",
                )
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(load_vision(folders.resolve(folders.VISION, name)))


class LikenessScore(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessScore",
            display_name="Score Likeness",
            category="likeness/score",
            description="Measures how well images preserve a subject (DINO, CLIP-I), follow a prompt (CLIP-T) and "
            "preserve everything outside the subject (PSNR, LPIPS), with whichever models are connected, and ranks "
            "the batch.",
            search_aliases=["dino score", "clip score", "similarity", "psnr", "lpips", "metrics", "rank"],
            inputs=_score_inputs(),
            optional=_optional_inputs(),
            outputs=_score_outputs(),
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lpips=NO_LPIPS, **_inputs) -> str:
        return "" if lpips == NO_LPIPS else folders.state(folders.LPIPS, lpips)

    @classmethod
    def execute(cls, images, lpips=NO_LPIPS, **request) -> io.NodeOutput:
        path = None if lpips == NO_LPIPS else folders.resolve(folders.LPIPS, lpips)
        scores = scoring.score(scoring.Request(images, lpips=path, **request))
        if cls.hidden:
            seconds = {name: seconds_of(name, cls.hidden.unique_id, cls.hidden.prompt) for name in scores.names}
            scores.seconds = {name: each for name, each in seconds.items() if each is not None}
        report = scores.report()
        captions = [scores.lines(i) for i in scores.shown]
        image = score_sheet(images[scores.shown], captions, scores.shown.index(scores.best), scores.models)
        numbers = (scores.of_best(name) for name in scoring.TITLES)
        order = ", ".join(map(str, scores.order))
        shown = {**ui.PreviewImage(image).as_dict(), **ui.PreviewText(report).as_dict()}
        return io.NodeOutput(*numbers, report, scores.best, order, image, ui=shown)


def _score_inputs() -> list[io.Input]:
    return [
        io.Image.Input("images", tooltip="The images to score, one or a batch."),
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            tooltip="The prompt that the images should follow, for CLIP-T. Needs a clip model with a text encoder. If "
            "empty, CLIP-T is not measured.",
        ),
        io.Combo.Input(
            "lpips",
            options=Names([NO_LPIPS, *folders.names(folders.LPIPS)]),
            default=NO_LPIPS,
            tooltip="LPIPS heads (alex.pth or vgg.pth) in models/likeness_lpips; torchvision's alexnet*.pth or "
            "vgg16*.pth must be in the same folder. Needs a reference of the same size.",
        ),
        inputs.choice(
            "rank_by",
            scoring.RANKINGS,
            "The score that decides the best image. overall: mean of DINO and CLIP-I, plus CLIP-T, as far as they are "
            "measured; PSNR if none of them is.",
        ),
    ]


def _optional_inputs() -> list[io.Input]:
    return [
        io.Image.Input(
            "reference",
            tooltip="An image of the subject: one for all images, or one per image. For PSNR and LPIPS, the image "
            "before the edit, at the same size.",
        ),
        io.Mask.Input(
            "mask",
            tooltip="White on the subject in the images. Identity is then measured on the subject alone, on white, "
            "and PSNR and LPIPS outside it. Masks of other sizes are resized.",
        ),
        io.Mask.Input(
            "reference_mask",
            tooltip="White on the subject in the reference. Not needed if the reference is already cut out on white.",
        ),
        io.ClipVision.Input(
            "dino",
            tooltip="Vision model for identity, usually DINOv2, from Load Vision Model or Load CLIP Vision.",
        ),
        io.ClipVision.Input(
            "clip",
            tooltip="Vision model for CLIP-I and CLIP-T. CLIP-T needs its text encoder: use Load Vision Model.",
        ),
        io.Boolean.Input(
            "all_references",
            default=False,
            tooltip="DINO and CLIP-I of an image are the mean over all references, as many as given: papers report it. "
            "Off: one reference for all images, or one each.",
        ),
        io.String.Input(
            "names",
            default="",
            tooltip="Names of the images, separated by commas, for the report and the grid, which then shows the best "
            "image first, with the seconds of trainings titled 'name: ...'. If empty, the images are numbered.",
        ),
    ]


def _score_outputs() -> list[io.Output]:
    best = "of the best image; -1 if not measured."
    return [
        output(io.Float, "dino", f"DINO identity (cosine, 1 = the same) {best}"),
        output(io.Float, "clip_i", f"CLIP identity (cosine, 1 = the same) {best}"),
        output(io.Float, "clip_t", f"CLIP agreement with the prompt (cosine) {best}"),
        output(io.Float, "psnr", f"PSNR outside the mask in dB (100 = equal) {best}"),
        output(io.Float, "lpips", f"LPIPS outside the mask (0 = equal) {best}"),
        output(io.String, "report", "A table of all images' scores, with the models used."),
        output(io.Int, "best", "Index of the best image in the batch, counted from 0."),
        output(io.String, "order", "All indices from best to worst, such as '2, 0, 1'."),
        output(io.Image, "picture", "A grid of the images with their scores."),
    ]
