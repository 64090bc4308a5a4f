"""The likeness optimisation on an image of three numbers: what is kept, when it ends, what is refused."""

from __future__ import annotations

import pytest
import torch

from likeness.core.siso.siso import Siso, SisoSettings, background_error, plateau, similarity_loss
from likeness.core.vision.instance_retrieval import from_published


def fit(losses=None, **settings) -> Siso:
    """An image that is its own parameter; with `losses`, its loss is what they say."""
    parameter = torch.nn.Parameter(torch.full((1, 3, 1, 1), 0.2))
    wanted = torch.tensor([0.9, 0.1, 0.5]).view(1, 3, 1, 1)
    numbers = iter(losses or [])

    def told(x: torch.Tensor) -> torch.Tensor:
        return 0.0 * x.sum() + next(numbers)

    terms = [told] if losses else [lambda x: (x - wanted).square().sum(), lambda x: 0.1 * x.mean()]
    return Siso(lambda: parameter.clamp(0, 1), terms, {"x": parameter}, SisoSettings(0.05, 0.0, **settings))


def test_the_loss_falls_and_the_best_is_of_one_iteration():
    run = fit()
    for _ in range(30):
        run.update()
    assert run.losses[-1] < 0.2 * run.losses[0]
    torch.testing.assert_close(run.best["x"].clamp(0, 1), run.image)
    assert run.parts[0] == pytest.approx([0.49 + 0.01 + 0.09, 0.02], abs=1e-6)


def test_resumed_it_goes_on_bit_for_bit():
    whole, first = fit(), fit()
    for _ in range(9):
        whole.update()
    for _ in range(4):
        first.update()
    state = {name: value.clone() for name, value in first.state().items()}
    second = fit()
    second.restore(state)
    for _ in range(5):
        second.update()
    assert second.losses == whole.losses and second.parts == whole.parts
    assert torch.equal(second.parameters["x"], whole.parameters["x"]) and torch.equal(second.best["x"], whole.best["x"])
    assert torch.equal(second.image, whole.image)


def test_how_far_it_goes_is_decided_by_the_settings_of_now():
    losses = [-1.0, -1.0, -1.0, -1.0, -2.0, -2.0]
    whole = fit(losses, patience=0)
    for _ in losses:
        whole.update()
    state = whole.state()
    for patience, done in ((0, False), (3, True), (4, False)):
        again = fit(losses, patience=patience)
        again.restore({name: value.clone() for name, value in state.items()})
        assert again.done == done, "it would have ended at the fourth, though the fifth is better"


@pytest.mark.parametrize(
    ("losses", "ends"), [([-1.0] * 9, 4), ([5.0, 4.0, 3.9, 3.95, 4.1], 5), ([1.0, 1.01, 1.02, 1.03], 4)]
)
def test_it_ends_after_iterations_without_an_improvement(losses, ends):
    run = fit(losses, patience=3)
    while not run.done:
        run.update()
    assert run.step == ends and min(run.losses) == pytest.approx(min(losses[:ends]))


def test_patience_zero_goes_on():
    run = fit([-1.0] * 20, patience=0)
    for _ in range(20):
        run.update()
    assert not run.done


def test_a_loss_that_is_not_a_number_changes_nothing():
    run = fit([-1.0, float("nan")])
    run.update()
    before = run.parameters["x"].detach().clone()
    with pytest.raises(RuntimeError, match="loss became nan at step 2"):
        run.update()
    assert torch.equal(run.parameters["x"], before) and run.step == 1


def test_several_references_count_alike():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert float(similarity_loss(a, a)) == -1.0
    assert float(similarity_loss(a, torch.cat([a, b]))) == pytest.approx(-0.5)


def test_a_mask_must_leave_a_background():
    one = torch.ones(1, 3, 4, 4)
    assert float(background_error(one, 0 * one, torch.zeros(1, 1, 4, 4))) == 1.0
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1
    inside = one.clone()
    inside[..., 2:] = 0
    assert float(background_error(inside, 0 * one, half)) == 0.0
    with pytest.raises(ValueError, match="covers the whole image"):
        background_error(one, one, torch.ones(1, 1, 4, 4))


def test_a_rise_of_positive_losses_is_no_improvement():
    losses = (1.0, 1.01, 1.02, 1.03, 1.04, 1.05)
    assert list(plateau(losses)) == [(1.0, count) for count in range(6)]
    assert list(plateau(losses, published=True)) == [(loss, 0) for loss in losses]
    assert SisoSettings(patience=5).stops(losses) and not SisoSettings(patience=6).stops(losses)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"backbone.conv1.weight": torch.zeros(8, 3, 14, 14)},
        {
            "backbone.conv1.weight": torch.zeros(8, 3, 14, 14),
            "backbone.positional_embedding": torch.zeros(257, 8),
            "backbone.proj": torch.zeros(8, 8),
            "fc1.weight": torch.zeros(4, 8),
            "backbone.transformer.resblocks.0.ln_1.weight": torch.zeros(8),
        },
    ],
    ids=["empty", "parts missing", "another stride"],
)
def test_other_weights_are_refused(tensors):
    with pytest.raises(ValueError, match="not the weights|another vision model"):
        from_published(tensors)
