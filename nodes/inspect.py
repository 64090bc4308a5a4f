"""Look at where the rows of a prompt are looked at (HiFi Tuner, figure 3)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.attention.host.map_sheet import map_sheet
from ..core.attention.host.maps import attention_maps
from .types import schema, seed_input


class LikenessInspect(io.ComfyNode):
    """MODEL + prompt + image -> attention maps of the prompt's last rows over the denoising."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessInspect",
            display_name="Inspect Attention",
            category="likeness/embedding",
            description="Shows where in an image the last rows of a prompt, the learned ones, are looked at: a row of "
            "maps for each of them, from noise on the left to the image on the right.",
            search_aliases=["attention map", "daam", "heatmap", "hifi tuner"],
            inputs=[
                io.Model.Input("model", tooltip="The model. It is not changed."),
                io.Conditioning.Input(
                    "conditioning", tooltip="A prompt with the embedding in it, from Apply Subject Embedding."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The image to look at, encoded. Noise of each level is added; of several "
                    "images the first is shown.",
                ),
                io.Int.Input(
                    "tokens",
                    default=5,
                    min=1,
                    max=77,
                    tooltip="How many rows, from the end of the prompt: as many as the embedding has.",
                ),
                io.Int.Input(
                    "columns", default=8, min=1, max=50, tooltip="At how many noise levels to look, evenly spread."
                ),
                seed_input("Decides the noise, the same at every level."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="maps",
                    tooltip="One row for each of the prompt's rows and one for their mean, one column for each level. "
                    "Every row is stretched to its own lightest place, whose attention is written beside it.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The mean over rows and levels, from 0 to 1, at the image's size.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, conditioning, latent, tokens, columns, seed) -> io.NodeOutput:
        maps = attention_maps(model, conditioning, latent, tokens, columns, seed, cls.hidden.unique_id)
        return io.NodeOutput(map_sheet(maps), maps.mask())


NODES = [LikenessInspect]
