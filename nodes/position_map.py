"""Tell a model fine-tuned on patches where in the image it is (SINE)."""

from comfy_api.latest import io

from ..core.sine.host.position_map import with_position_map
from ..core.sine.position_map import CELLS, INTERPOLATIONS, MAX_CELLS
from . import inputs
from .node import Node, output, schema


class LikenessPositionMap(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessPositionMap",
            display_name="Position Map",
            category="likeness/fine_tune",
            description="Gives a model that was fine-tuned on patches of an image its position map (SINE). Fine-Tune "
            "On Image and Load Fine-Tune attach it automatically; use this node for files from other loaders and for "
            "tiles.",
            search_aliases=["sine", "patch", "tile"],
            inputs=[
                io.Model.Input("model", tooltip="A model that was fine-tuned on patches."),
                inputs.number(
                    "cells",
                    CELLS,
                    (2, MAX_CELLS),
                    "Cells per side of the map, as in training: 128 for SINE's own checkpoints and for "
                    "training at 512 pixels.",
                ),
                inputs.choice(
                    "interpolation",
                    INTERPOLATIONS,
                    "Interpolation of the map, as in training. SINE uses bilinear for photographs and nearest for "
                    "paintings.",
                ),
                *inputs.advanced(*(inputs.fraction(name, default, TILE + what) for name, default, what in WINDOW)),
            ],
            outputs=[output(io.Model, "model", "The model with its position map.")],
        )

    @classmethod
    def execute(cls, model, cells, interpolation, x=0.0, y=0.0, width=1.0, height=1.0) -> io.NodeOutput:
        return io.NodeOutput(with_position_map(model, cells, interpolation, (y, x, height, width)))


TILE = "Only for sampling one tile of a larger image by itself: "
WINDOW = (
    ("x", 0.0, "the left edge of the tile, where 0 is the left edge of the whole image."),
    ("y", 0.0, "the upper edge of the tile, where 0 is the upper edge of the whole image."),
    ("width", 1.0, "the width of the tile, where 1 is the whole image."),
    ("height", 1.0, "the height of the tile, where 1 is the whole image."),
)
