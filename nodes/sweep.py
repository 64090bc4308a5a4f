"""Sweep the guidance over K and v: all pairs as lists, and their results as a grid with curves."""

from comfy_api.latest import io

from ..core.sine import sweep
from ..core.sine.host.sweep import grid_sheet, measures, plot_sheet
from .node import Node, output, schema

NAMES = ("base_weight", "end_percent")
AFTER, LIST = "for Subject Guidance and Plot Guidance Sweep", "The list of this name, from Sweep Guidance."


class LikenessSweep(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSweep",
            display_name="Sweep Guidance",
            category="likeness/guidance",
            description="Outputs all pairs of the two guidance settings as lists, so that everything downstream runs "
            "once per pair. Plot Guidance Sweep collects the results.",
            search_aliases=["sine", "xy plot", "grid search", "sweep"],
            inputs=[
                io.String.Input(
                    "base_weights",
                    default="0.3, 0.5, 0.7, 0.9",
                    tooltip="Values for base_weight (v), from 0 to 1, separated by commas. Higher follows the edit "
                    "prompt more, lower keeps more of the image.",
                ),
                io.String.Input(
                    "end_percents",
                    default="0.2, 0.4, 0.6, 0.8",
                    tooltip="Values for end_percent (K), from 0 to 1, separated by commas. 0.6 is the paper's K = "
                    "400. Higher keeps more of the image.",
                ),
            ],
            outputs=[
                output(io.Float, name, f"The {name} of each pair, {AFTER}.", is_output_list=True) for name in NAMES
            ],
        )

    @classmethod
    def execute(cls, base_weights, end_percents) -> io.NodeOutput:
        weights = sweep.numbers(base_weights, "base_weights")
        found = sweep.pairs(weights, sweep.numbers(end_percents, "end_percents"))
        return io.NodeOutput([weight for weight, _ in found], [end for _, end in found])


class LikenessSweepPlot(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSweepPlot",
            display_name="Plot Guidance Sweep",
            category="likeness/guidance",
            description="Collects the results of a sweep: the images in a grid, with one row per end_percent and one "
            "column per base_weight, and their metrics as curves. Several images of a pair share a cell; their "
            "metrics are averaged.",
            search_aliases=["sine", "xy plot", "grid", "sweep"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The results: one image for each pair, or the same number for each."),
                *(io.Float.Input(name, force_input=True, tooltip=LIST) for name in NAMES),
            ],
            optional=[
                io.Float.Input(
                    "distance",
                    force_input=True,
                    tooltip="A distance to the source image, such as lpips from Score Likeness. Lower is closer.",
                ),
                io.Float.Input(
                    "identity",
                    force_input=True,
                    tooltip="A similarity to the source image, such as dino or clip_i from Score Likeness. It is "
                    "plotted as the distance 1 - identity.",
                ),
                io.Float.Input(
                    "text",
                    force_input=True,
                    tooltip="The similarity of each image to the edit prompt: clip_t from Score Likeness.",
                ),
            ],
            outputs=[
                output(io.Image, "grid", "All images, labeled with their settings."),
                output(
                    io.Image,
                    "plot",
                    "The metrics over v for each K, and over K for each v. Nodes connected here do not run if "
                    "nothing was measured.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images, base_weight, end_percent, distance=None, identity=None, text=None) -> io.NodeOutput:
        grid = sweep.grid(base_weight, end_percent)
        pictures = sweep.of_each_pair(images, len(base_weight))
        drawn = measures(len(base_weight), distance, identity, text)
        return io.NodeOutput(grid_sheet(pictures, grid), plot_sheet(drawn, grid) if drawn else None)
