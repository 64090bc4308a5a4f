"""SINE's equation 3 and its windows, on numbers."""

from __future__ import annotations

import pytest
import torch

from likeness.core.prompt.windows import SigmaRange
from likeness.core.sine.guidance import base_share, check_weights, mix_predictions, percent_of
from likeness.core.sine.position_map import position_map, sinusoids


def prediction(kind: str, x, sigma, p):
    """D from the raw output P of each kind of model."""
    if kind == "v":
        return x / (sigma**2 + 1) - sigma * p / (sigma**2 + 1) ** 0.5
    return x - sigma * p  # eps, and flow


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("v", [0.0, 0.3, 1.0, 1.4])
def test_mixing_denoised_predictions_is_mixing_the_raw_ones(kind, v):
    """Equation 3 on eps (or v, or flow velocity), and on D: the same, for weights outside of 0..1 too."""
    generator = torch.Generator().manual_seed(0)
    x, u, c, e = torch.randn(4, 2, 4, 6, 5, generator=generator, dtype=torch.float64)
    w, sigma = 7.5, 3.0
    raw = u + w * (v * c + (1 - v) * e - u)
    d_u, d_c, d_e = (prediction(kind, x, sigma, p) for p in (u, c, e))
    conditional = mix_predictions(d_c, [d_e], [1 - v]).double()
    torch.testing.assert_close(d_u + w * (conditional - d_u), prediction(kind, x, sigma, raw), atol=1e-4, rtol=0)


def test_one_model_is_the_chain_of_one_and_a_dropped_one_gives_its_weight_back():
    c, a, b = torch.randn(3, 1, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mix_predictions(c, [a, b], [0.3, 0.0]), mix_predictions(c, [a], [0.3]) + 0 * b)
    torch.testing.assert_close(mix_predictions(c, [a, b], [0.4, 0.5]), 0.1 * c + 0.4 * a + 0.5 * b)
    torch.testing.assert_close(mix_predictions(None, [a], [1.0]), a)


def test_the_base_model_keeps_what_the_tuned_ones_leave():
    assert base_share([1 - 0.7]) == pytest.approx(0.7)
    assert base_share([0.1] * 10) == 0.0  # 1 - 0.9999999999999999
    check_weights([0.4, 0.6], allow_over_one=False)
    check_weights([0.9, 0.9], allow_over_one=True)
    with pytest.raises(ValueError, match=r"0\.4, 0\.7 add up to 1\.1.*lower them"):
        check_weights([0.4, 0.7], allow_over_one=False)


def test_half_precision_is_mixed_in_single():
    c = torch.full((1, 4, 2, 2), 1.0, dtype=torch.float16)
    e = torch.full((1, 4, 2, 2), 1.001, dtype=torch.float16)
    exact = 0.5 * c.double() + 0.5 * e.double()
    assert mix_predictions(c, [e], [0.5]).dtype == torch.float16
    assert torch.equal(mix_predictions(c, [e], [0.5]), exact.half())


def test_the_window_is_open_at_k():
    """The paper's t > K, with noise levels that went through float32 on the way."""
    window = SigmaRange(high=999999999.9, low=1.1644)
    assert not window.holds(1.1644) and not window.holds(1.16441) and window.holds(1.1690) and window.holds(14.6)
    assert not SigmaRange(high=1.1644, low=0.0).holds(1.1690) and SigmaRange(high=1.1644, low=0.0).holds(1.1644)
    assert percent_of(400) == pytest.approx(0.5996, abs=1e-4) and percent_of(0) == 1.0 and percent_of(999) == 0.0


def test_columns_come_before_rows():
    """Channels 0 to half tell x, the others y: seen with a box and a latent that are not square."""
    box = torch.tensor([[2, 5, 4, 11]])
    found = position_map(8, 16, box, (2, 6), "nearest")[0]
    table = sinusoids(16, 4)
    for row in range(2):
        for column in range(6):
            torch.testing.assert_close(found[:4, row, column], table[5 + column])
            torch.testing.assert_close(found[4:, row, column], table[2 + row])


def test_a_box_between_cells_is_widened():
    box = torch.tensor([[1.2, 0.0, 3.9, 8.0]])
    assert torch.equal(position_map(8, 8, box, (3, 8)), position_map(8, 8, torch.tensor([[1, 0, 4, 8]]), (3, 8)))


def test_refusals():
    with pytest.raises(ValueError, match="multiple of 4"):
        position_map(6, 8, torch.tensor([[0, 0, 8, 8]]), (2, 2))
    with pytest.raises(ValueError, match="expected one of bilinear, nearest"):
        position_map(8, 8, torch.tensor([[0, 0, 8, 8]]), (2, 2), "cubic")
    with pytest.raises(ValueError, match="not a part of the position map's 8 x 8 cells"):
        position_map(8, 8, torch.tensor([[0, 0, 16, 16]]), (2, 2))
