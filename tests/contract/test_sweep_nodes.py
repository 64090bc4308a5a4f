"""The two sweep nodes as ComfyUI calls them: lists out, lists in, and what is drawn where."""

from __future__ import annotations

import asyncio

import pytest
import torch

from .methods import run_node

WEIGHTS, ENDS = "0.3, 0.5, 0.7", "0.2, 0.6"
SIDE = 200  # px, between the smallest and the largest of a sheet: images are not resized


def shades(weights, ends) -> list[torch.Tensor]:
    """For each pair one flat image: red is the base weight, green the end percent."""
    made = []
    for weight, end in zip(weights, ends, strict=True):
        picture = torch.zeros(1, SIDE, SIDE, 3)
        picture[..., 0], picture[..., 1], picture[..., 2] = weight, end, 1.0
        made.append(picture)
    return made


def plot(weights, ends, **measures):
    from likeness.nodes.sweep import LikenessSweepPlot

    inputs = {"images": shades(weights, ends), **measures}
    return run_node(LikenessSweepPlot, base_weight=weights, end_percent=ends, **inputs)


def swept() -> tuple[list[float], list[float]]:
    from likeness.nodes.sweep import LikenessSweep

    return run_node(LikenessSweep, base_weights=WEIGHTS, end_percents=ENDS)


def test_comfyui_runs_a_node_once_for_each_pair_and_hands_the_plot_all_at_once():
    """Through the server's own mapping of lists, rather than by our knowledge of it."""
    import execution

    from likeness.nodes.sweep import LikenessSweep, LikenessSweepPlot

    def call(node, inputs):
        made = asyncio.run(execution.get_output_data("prompt", "1", node, inputs))
        return made[0]

    with torch.inference_mode():
        weights, ends = call(LikenessSweep, {"base_weights": [WEIGHTS], "end_percents": [ENDS]})
        assert weights == [0.3, 0.5, 0.7] * 2 and ends == [0.2] * 3 + [0.6] * 3
        drawn = call(
            LikenessSweepPlot,
            {"images": shades(weights, ends), "base_weight": weights, "end_percent": ends, "text": weights},
        )
    assert [len(output) for output in drawn] == [1, 1]
    assert all(output[0].ndim == 4 and output[0].shape[0] == 1 for output in drawn)


def test_rows_are_end_percents_and_columns_base_weights():
    sheet = plot(*swept())[0][0]
    flat = [sheet[y, x] for y in range(sheet.shape[0]) for x in range(0, sheet.shape[1], 20) if sheet[y, x, 2] == 1.0]
    seen = {(round(float(red), 1), round(float(green), 1)) for red, green, _ in flat}
    assert seen == {(weight, end) for weight in (0.3, 0.5, 0.7) for end in (0.2, 0.6)}
    for end in (0.2, 0.6):
        row = next(y for y in range(sheet.shape[0]) if bool(is_shade(sheet[y], 1, end).any()))
        reds = [round(float(red), 1) for red in sheet[row, :, 0][sheet[row, :, 2] == 1.0]]
        assert reds == [0.3] * SIDE + [0.5] * SIDE + [0.7] * SIDE
    tops = [next(y for y in range(sheet.shape[0]) if bool(is_shade(sheet[y], 1, end).any())) for end in (0.2, 0.6)]
    assert tops[0] + SIDE < tops[1] + 1


def is_shade(row: torch.Tensor, channel: int, value: float) -> torch.Tensor:
    return (row[:, 2] == 1.0) & ((row[:, channel] - value).abs() < 0.01)


def test_the_order_of_the_results_does_not_matter():
    weights, ends = swept()
    back = list(reversed(weights)), list(reversed(ends))
    assert torch.equal(plot(weights, ends)[0], plot(*back)[0])
    assert torch.equal(plot(weights, ends, text=weights)[1], plot(*back, text=back[0])[1])


def test_a_row_of_panels_for_each_measure():
    weights, ends = swept()
    heights = [plot(weights, ends, **more)[1].shape[1] for more in measure_sets(weights)]
    assert heights == [heights[0], heights[0], 2 * heights[0], 3 * heights[0]]
    assert torch.equal(
        plot(weights, ends, identity=[1 - w for w in weights], text=ends)[1].mean((0, 2, 3))[40:280],
        plot(weights, ends, identity=[1 - w for w in weights])[1].mean((0, 2, 3))[40:280],
    ), "a panel depends on the other measures"


def measure_sets(weights):
    minus = [-1.0] * len(weights)
    return (
        {"text": weights},
        {"distance": weights, "identity": minus, "text": minus},
        {"distance": weights, "text": weights},
        {"distance": weights, "identity": weights, "text": weights},
    )


def test_identity_is_drawn_as_a_distance():
    weights, ends = swept()
    inverse = plot(weights, ends, identity=[1.0 - weight for weight in weights])[1]
    upward, downward = (
        plot(weights, ends, distance=weights)[1],
        plot(weights, ends, distance=[1 - w for w in weights])[1],
    )
    body = (slice(None), slice(36, 244))  # below the title, which differs
    assert float((inverse[body] - upward[body]).abs().max()) < 0.02
    assert float((inverse[body] - downward[body]).abs().max()) > 0.2


def test_without_measures_nothing_runs_behind_the_plot():
    from comfy_execution.graph_utils import ExecutionBlocker

    weights, ends = swept()
    for more in ({}, {"text": [-1.0] * 6}):
        grid, drawn = plot(weights, ends, **more)
        assert isinstance(drawn, ExecutionBlocker) and grid.std() > 0.05


@pytest.mark.parametrize("values", [[0.5] * 6, [1e9, -1e9, 0, 0, 0, 0], [0.5, 0.5 + 1e-9, 0.5, 0.5, 0.5, 0.5]])
def test_any_values_can_be_drawn(values):
    drawn = plot(*swept(), distance=values)[1]
    assert bool(torch.isfinite(drawn).all()) and drawn.std() > 0.05


def test_one_pair_is_a_grid_too():
    grid, drawn = plot([0.7], [0.6], text=[0.3])
    assert grid.shape[1] > SIDE and drawn.shape[2] > SIDE


def test_many_pictures_are_shown_smaller():
    weights = [i / 20 for i in range(20)]
    assert plot(weights, [0.5] * 20)[0].shape[2] < 4600


def test_several_images_of_a_pair_are_one_cell_and_one_point():
    weights, ends = swept()
    images = [torch.cat([image, image]) for image in shades(weights, ends)]
    around = [weight + change for weight in weights for change in (-0.25, 0.25)]
    grid, drawn = plot(weights, ends, images=images, distance=around)
    single, curve = plot(weights, ends, distance=weights)
    assert grid.shape[2] - single.shape[2] == 3 * SIDE
    assert torch.equal(drawn, curve)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"text": [0.1]}, "1 values of text score came for 6 pairs: give the same number"),
        ({"images": [torch.zeros(1, 8, 8, 3)]}, "1 images came for 6 pairs"),
        ({"base_weight": [0.3]}, "1 base weights came with 6"),
        ({"distance": [float("nan")] * 6}, "'distance' is nan, expected a number"),
    ],
)
def test_lists_that_do_not_belong_together(more, sentence):
    from likeness.nodes.sweep import LikenessSweepPlot

    weights, ends = swept()
    inputs = {"images": shades(weights, ends), "base_weight": weights, "end_percent": ends, **more}
    with pytest.raises(ValueError, match=sentence):
        run_node(LikenessSweepPlot, **inputs)
