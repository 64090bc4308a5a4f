"""Choose the step of a subject embedding by its images."""

from comfy_api.latest import io, ui

from ..core.embedding import hiper
from ..core.embedding.host.best_step import Trial, choose_step
from ..core.embedding.host.train import Previews
from ..core.vision.host.scoring import Request
from ..core.vision.host.sheets import score_sheet
from . import inputs
from .node import Embedding, Node, build, output, schema


class LikenessBestStep(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessBestStep",
            display_name="Choose Best Step",
            category="likeness/embedding",
            description="Draws a new prompt with every saved step of an embedding and chooses an earlier step "
            "than the last where it is clearly more alike and follows the prompt as well.",
            search_aliases=["hiper", "best step", "overfit", "subject", "pick the step"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the embedding was trained on."),
                Embedding.Input("embedding", tooltip="From Train Subject Embedding, with several saved steps."),
                io.Conditioning.Input("positive", tooltip="A new prompt for the subject: not the source prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent: the size of the images."),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                io.Image.Input("reference", tooltip="The image of the subject."),
                inputs.count("images", 3, 16, "Images per saved step; more of them find smaller differences."),
                inputs.count(
                    "most_steps",
                    4,
                    100,
                    "How many of the saved steps to try, at equal distances. The last one is among them.",
                ),
                inputs.scale(hiper.SCALE, "Strength of the embedding in the images."),
                inputs.seed("Seed of the first image's noise; the same noise is used for every step."),
                *inputs.advanced(
                    inputs.count("steps", 20, 1000, "Sampling steps of each image."),
                    inputs.cfg(7.5, "Guidance scale. Without a negative prompt it is 1."),
                ),
            ],
            optional=[
                io.ClipVision.Input("dino", tooltip="Measures likeness: DINOv2 from Load Vision Model, for instance."),
                io.ClipVision.Input(
                    "clip",
                    tooltip="A CLIP model: measures likeness too and, with a text encoder and 'prompt', how well the "
                    "prompt is followed.",
                ),
                io.String.Input(
                    "prompt", default="", force_input=True, tooltip="The text of the new prompt, for the CLIP model."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt of the images."),
                io.Mask.Input("reference_mask", tooltip="White on the subject: only that part is compared."),
            ],
            outputs=[
                output(
                    Embedding, "embedding", "The same embedding. Step 0 of Apply Subject Embedding is now the best one."
                ),
                output(io.Int, "step", "The best step."),
                output(io.Image, "images", "First the images without the subject, then those of each step."),
                output(io.String, "report", "The scores of every step."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, embedding, positive, latent_image, images, most_steps, scale, reference, prompt="", **more
    ) -> io.NodeOutput:
        seen = {"images": reference, "reference": reference, "prompt": prompt or ""}
        sampling, request = build({"negative": None, **more, **seen}, Previews, Request)
        trial = Trial(positive, latent_image["samples"], sampling, scale, images, most_steps)
        choice = choose_step(model, embedding, trial, request)
        sheet = score_sheet(choice.images, choice.captions(), choice.best_image, [])
        shown = {**ui.PreviewImage(sheet).as_dict(), **ui.PreviewText(choice.report()).as_dict()}
        return io.NodeOutput(choice.embedding, choice.step, choice.images, choice.report(), ui=shown)
