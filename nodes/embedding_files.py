"""Save and load subject embeddings."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.embedding.artifact import load_embedding, save_embedding
from ..core.session import folders
from . import inputs
from .node import Node, SavingNode
from .types import Embedding, output, schema


class LikenessSaveEmbedding(SavingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSaveEmbedding",
            display_name="Save Subject Embedding",
            category="likeness/embedding",
            description="Saves the learned subject as a small safetensors file in models/likeness_embeddings.",
            search_aliases=["hiper", "hifi tuner", "textual inversion", "save embedding"],
            inputs=[
                Embedding.Input("embedding", tooltip="A trained subject embedding."),
                inputs.prefix("likeness/subject"),
            ],
            outputs=[
                output(Embedding, "embedding", "The embedding, passed through."),
                output(io.String, "name", "The name under which Load Subject Embedding lists the file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embedding, filename_prefix) -> io.NodeOutput:
        return cls.saved(folders.EMBEDDINGS, embedding, filename_prefix, save_embedding, embedding.describe())


class LikenessLoadEmbedding(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadEmbedding",
            display_name="Load Subject Embedding",
            category="likeness/embedding",
            description="Loads a learned subject from models/likeness_embeddings: a .safetensors file of this pack, "
            "or a .pt file of HiPer's reference code.",
            search_aliases=["hiper", "hifi tuner", "textual inversion", "load embedding"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.EMBEDDINGS),
                    tooltip="A file in models/likeness_embeddings. Press R to refresh the list after saving one.",
                )
            ],
            outputs=[
                output(Embedding, "embedding", "The loaded subject embedding."),
                output(io.String, "info", "Method, number of tokens, base model, saved steps and loss."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name) -> str:
        return folders.state(folders.EMBEDDINGS, name)

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        embedding = load_embedding(folders.resolve(folders.EMBEDDINGS, name))
        return io.NodeOutput(embedding, embedding.describe())
