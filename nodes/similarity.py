"""Define what generated images should be similar to (SISO)."""

from comfy_api.latest import io

from ..core.session import folders
from ..core.siso.host import similarity as host
from ..core.vision.host.vision import load_retrieval_model
from . import inputs
from .node import Node, Similarity, output, schema


class LikenessLoadRetrievalModel(Node, files={"name": folders.RETRIEVAL}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadRetrieval",  # scanners of node packs take its last letters for running code
            display_name="Load Instance Retrieval",
            category="likeness/similarity",
            description="Loads the instance-retrieval model that SISO uses alongside DINOv2: the first-place weights "
            "of the Google Universal Image Embedding challenge, which you download yourself. DINOv2 alone works "
            "nearly as well.",
            search_aliases=["siso", "ir features", "instance retrieval"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.RETRIEVAL),
                    tooltip="A file in models/ir_features: the published .pth (loaded without executing code), or its "
                    "tensors as safetensors. Press R to refresh the list.",
                )
            ],
            outputs=[output(io.ClipVision, "vision", "The vision model, for Likeness To Images.")],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(load_retrieval_model(folders.resolve(folders.RETRIEVAL, name)))


class LikenessSimilarity(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSimilarity",
            display_name="Likeness To Images",
            category="likeness/similarity",
            description="Defines what generated images should be similar to: the subject's images, as a vision model "
            "sees them. SISO adds up DINOv2 (large) and instance retrieval, each with weight 1.",
            search_aliases=["siso", "dino loss", "similarity loss", "reward"],
            inputs=[
                io.ClipVision.Input(
                    "vision",
                    tooltip="DINOv2 large from Load CLIP Vision or Load Vision Model, or the model of Load Instance "
                    "Retrieval. CLIP and SigLIP work too, but are not in the paper.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="One or more images of the subject; their mean similarity counts. Only the central square "
                    "of each image is used.",
                ),
                inputs.number(
                    "weight",
                    1.0,
                    (0.0, 10.0, 0.05),
                    "Weight of this similarity. SISO uses 1 for DINOv2 and for instance retrieval.",
                ),
            ],
            optional=[
                Similarity.Input("similarity", tooltip="Another similarity to add this one to."),
                io.Mask.Input(
                    "mask",
                    tooltip="White on the subject, which is then cut out and put on white, so that nothing is lost at "
                    "the border. Not in the paper, which uses the whole image.",
                ),
            ],
            outputs=[output(Similarity, "similarity", "For Optimize LoRA, or to combine with another.")],
        )

    @classmethod
    def execute(cls, vision, image, weight, similarity=None, mask=None) -> io.NodeOutput:
        parts = () if similarity is None else similarity.parts
        return io.NodeOutput(host.Similarity((*parts, host.similarity_part(vision, weight, image, mask))))
