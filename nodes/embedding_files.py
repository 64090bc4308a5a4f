"""Save and load subject embeddings."""

from __future__ import annotations

import functools

from comfy_api.latest import io, ui

from ..core.embedding.artifact import load_embedding, save_embedding
from ..core.session import folders
from ..core.session.outputs import prefix_answer, save_numbered
from .node import Node
from .types import Embedding, schema


class LikenessSaveEmbedding(Node):
    """LIKENESS_EMBEDDING -> a safetensors file in models/likeness_embeddings."""

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
                io.String.Input(
                    "filename_prefix",
                    default="likeness/subject",
                    tooltip="File name, optionally with subfolders. A number is appended, so nothing is overwritten.",
                ),
            ],
            outputs=[
                Embedding.Output(display_name="embedding", tooltip="The embedding, passed through."),
                io.String.Output(
                    display_name="name", tooltip="The name under which Load Subject Embedding lists the file."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix) -> bool | str:
        return prefix_answer(filename_prefix)

    @classmethod
    def execute(cls, embedding, filename_prefix) -> io.NodeOutput:
        save = functools.partial(save_embedding, embedding=embedding, replace=False)
        path = save_numbered(folders.first_folder(folders.EMBEDDINGS), filename_prefix, save)
        name = folders.listed_name(folders.EMBEDDINGS, path)
        return io.NodeOutput(embedding, name, ui=ui.PreviewText(f"{name}\n{embedding.describe()}"))


class LikenessLoadEmbedding(Node):
    """A file in models/likeness_embeddings -> LIKENESS_EMBEDDING."""

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
                Embedding.Output(display_name="embedding", tooltip="The loaded subject embedding."),
                io.String.Output(
                    display_name="info", tooltip="Method, number of tokens, base model, saved steps and loss."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name) -> str:
        return folders.state(folders.EMBEDDINGS, name)

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        embedding = load_embedding(folders.resolve(folders.EMBEDDINGS, name))
        return io.NodeOutput(embedding, embedding.describe())


NODES = [LikenessSaveEmbedding, LikenessLoadEmbedding]
