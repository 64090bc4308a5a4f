"""Refine a subject embedding for each denoising step (HiFi Tuner)."""

from comfy_api.latest import io

from ..core.embedding import hifi_tuner
from ..core.embedding.host.refine import refine_embedding
from ..core.embedding.host.train import RegularizerOptions
from ..core.session.images import ImageSource
from ..core.session.outputs import loss_map
from . import inputs
from .embedding import anchor_inputs, image_inputs
from .node import Embedding, LossMap, Node, build, output, schema


class LikenessRefineEmbedding(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessRefineEmbedding",
            display_name="Refine Subject Embedding (HiFi Tuner)",
            category="likeness/embedding",
            description="Trains an embedding further for each denoising step separately, starting from the noisiest "
            "(HiFi Tuner), so that early steps hold shape and late steps hold detail.",
            search_aliases=["hifi tuner", "step-wise", "textual inversion", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the embedding was trained on. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The source prompt that the embedding was trained with."),
                Embedding.Input("embedding", tooltip="From Train Subject Embedding or Load Subject Embedding."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels of the sampling, from BasicScheduler. Separate token embeddings are learned "
                    "for each of its steps; other schedules use those of the nearest level.",
                ),
                inputs.inner_steps(hifi_tuner.INNER_STEPS, "Updates per denoising step. The paper uses 10."),
                inputs.rate(hifi_tuner.LEARNING_RATE, "Adam's learning rate, as in the embedding's training."),
                inputs.saved_step("Saved step of the embedding to start from. 0 selects the recommended one."),
                inputs.seed("Seed of the image and the noise of each update."),
            ],
            optional=[
                *image_inputs("Encodes the image."),
                io.Conditioning.Input(
                    "negative", tooltip="The empty prompt, which the regularizer pulls the embedding towards."
                ),
                *anchor_inputs(),
            ],
            outputs=[
                output(Embedding, "embedding", "The step-wise embedding, for Apply Subject Embedding with scale 1."),
                output(LossMap, "loss", "The loss of every update, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, embedding, sigmas, step, **more) -> io.NodeOutput:
        source, settings, anchor = build(more, ImageSource, hifi_tuner.StepWiseSettings, RegularizerOptions)
        images = source.encoded(model)
        refined, losses = refine_embedding(model, positive, images, embedding, sigmas, settings, anchor, step)
        return io.NodeOutput(refined, loss_map(losses))
