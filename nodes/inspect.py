"""Inspect which parts of an image attend to the tokens of a prompt (HiFi Tuner, figure 3)."""

from comfy_api.latest import io

from ..core.attention.host.maps import attention_maps, map_sheet
from . import inputs
from .node import Node, output, schema


class LikenessInspect(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessInspect",
            display_name="Inspect Attention",
            category="likeness/embedding",
            description="Shows which parts of an image attend to the last tokens of a prompt, the learned ones: one "
            "row of maps per token, from noise on the left to the image on the right.",
            search_aliases=["attention map", "daam", "heatmap", "hifi tuner"],
            inputs=[
                io.Model.Input("model", tooltip="The model to inspect. It is not changed."),
                io.Conditioning.Input(
                    "conditioning", tooltip="A prompt that contains the embedding, from Apply Subject Embedding."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The encoded image to inspect. Noise of each level is added to it; only the first image "
                    "of a batch is used.",
                ),
                inputs.count(
                    "tokens",
                    5,
                    77,
                    "Number of tokens to show, counted from the end of the prompt: as many as the embedding has.",
                ),
                inputs.count("columns", 8, 50, "Number of noise levels to show, evenly spaced."),
                inputs.seed("Seed of the noise, which is the same at every level."),
            ],
            outputs=[
                output(
                    io.Image,
                    "maps",
                    "One row per token and one for their mean, one column per noise level. Each row is "
                    "normalized by itself, with its highest attention written beside it.",
                ),
                output(io.Mask, "mask", "The mean over tokens and noise levels, from 0 to 1, at the image's size."),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, latent, tokens, columns, seed) -> io.NodeOutput:
        maps = attention_maps(model, conditioning, latent, tokens, columns, seed)
        return io.NodeOutput(map_sheet(maps), maps.mask())
