"""Refine a subject embedding for each denoising step (HiFi Tuner)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.embedding import hifi_tuner
from ..core.embedding.host.refine import SavedStep, refine_embedding
from ..core.session.images import ImageSource
from ..core.session.outputs import loss_map
from .embedding import ANCHORS, anchor_inputs, held, image_inputs
from .node import Node
from .types import Embedding, LossMap, schema, seed_input


class LikenessRefineEmbedding(Node):
    """LIKENESS_EMBEDDING + SIGMAS -> separate token embeddings for each denoising step."""

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
                io.Int.Input(
                    "inner_steps",
                    default=hifi_tuner.INNER_STEPS,
                    min=1,
                    max=1000,
                    tooltip="Updates per denoising step. The paper uses 10.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=hifi_tuner.LEARNING_RATE,
                    min=1e-9,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Adam's learning rate, as in the embedding's training.",
                ),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Saved step of the embedding to start from. 0 selects the recommended one.",
                ),
                seed_input("Seed of the image and the noise of each update."),
                *image_inputs("Encodes the image."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The empty prompt, which the regularizer pulls the embedding towards.",
                ),
                *anchor_inputs(0.0),
            ],
            outputs=[
                Embedding.Output(
                    display_name="embedding",
                    tooltip="The step-wise embedding, for Apply Subject Embedding with scale 1.",
                ),
                LossMap.Output(display_name="loss", tooltip="The loss of every update, for Plot Loss Graph."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        embedding,
        sigmas,
        inner_steps,
        learning_rate,
        step,
        seed,
        latent=None,
        image=None,
        vae=None,
        mask=None,
        negative=None,
        anchor_weight=0.0,
        anchor=ANCHORS[0],
    ) -> io.NodeOutput:
        refined, losses = refine_embedding(
            model,
            positive,
            ImageSource(latent, image, vae, mask).encoded(model),
            SavedStep(embedding, step),
            sigmas,
            hifi_tuner.StepWiseSettings(inner_steps, learning_rate, seed),
            held(negative, anchor_weight, anchor),
            cls.hidden.unique_id,
        )
        return io.NodeOutput(refined, loss_map(losses))


NODES = [LikenessRefineEmbedding]
