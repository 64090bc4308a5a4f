"""Attention maps of a prompt's rows in ComfyUI: which rows, at which level, and what the sheet shows."""

from __future__ import annotations

import pytest
import torch

from .. import tiny_models
from .methods import run_node, sample
from .setting import SharedSetting as Setting


def looked_at(setting, conditioning=None, **changes) -> tuple:
    from likeness.nodes.inspect import LikenessInspect

    inputs = {"model": setting.model, "conditioning": conditioning or setting.source, "latent": setting.latent}
    return run_node(LikenessInspect, **{**inputs, "tokens": 5, "columns": 4, "seed": 0, **changes})


def maps(setting, conditioning=None, tokens: int = 5, levels: int = 4, seed: int = 0, **changes):
    from likeness.core.attention.host.maps import attention_maps

    inputs = {"model": setting.model, "latent": setting.latent, **changes}
    with torch.inference_mode():
        return attention_maps(inputs["model"], conditioning or setting.source, inputs["latent"], tokens, levels, seed)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_row_and_level_has_its_map(family):
    setting = Setting(family, images=2, size=(9, 7))
    sheet, mask = looked_at(setting)
    assert (
        sheet.ndim == 4
        and sheet.shape[0] == 1
        and sheet.shape[3] == 3
        and 0 <= float(sheet.min()) < float(sheet.max()) <= 1
    )
    assert mask.shape == (1, 72, 56) and float(mask.min()) == 0 and float(mask.max()) == 1
    found = maps(setting)
    assert found.values.shape == (4, 5, 9, 7) and found.percents == [0.125, 0.375, 0.625, 0.875]
    assert len({float(value.sum()) for value in found.values.flatten(0, 1)}) == 20, "two maps are one"


def test_predictions_without_numbers_give_no_maps():
    setting = Setting()
    with pytest.raises(RuntimeError, match="'maps' came out with NaN or infinite numbers, expected finite ones: load"):
        looked_at(setting, [[1e25 * setting.source[0][0], setting.source[0][1]]])


WHOLE = pytest.param((64, 64), 50, 77, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("size", "levels", "tokens"), [WHOLE, ((64, 64), 5, 77), ((128, 32), 5, 77), ((32, 128), 50, 5)]
)
def test_many_maps_are_shown_smaller(size, levels, tokens):
    """The whole prompt, and every level, fit on a sheet that can be shown; few maps keep their size."""
    from likeness.core.attention.host.maps import SHEET, TILE, Maps, map_sheet

    many = map_sheet(Maps(torch.rand(levels, tokens, *size), [index / levels for index in range(levels)]))
    assert SHEET / 3 < max(many.shape[1:3]) < SHEET + 200
    few = map_sheet(Maps(torch.rand(2, 1, *size), [0.25, 0.75]))
    assert max(few.shape[1:3]) > 2 * TILE


def test_all_rows_of_the_prompt_add_up_to_one_everywhere():
    found = maps(Setting(), tokens=77)
    torch.testing.assert_close(found.values.sum(1), torch.ones(4, 8, 8), atol=1e-5, rtol=0)


def test_rows_that_are_equal_share_the_attention_equally():
    rows, options = tiny_models.prompt("sd1", 1)[0]
    found = maps(Setting(), [[rows[:, :1].expand(-1, 77, -1), options]]).values
    torch.testing.assert_close(found, torch.full_like(found, 1 / 77), atol=1e-6, rtol=0)


def test_step_wise_rows_are_looked_at_where_they_hold():
    setting = Setting()
    windows = [(0.0, 0.4), (0.4, 1.0)]
    tables = [tiny_models.prompt("sd1", seed)[0] for seed in (11, 12)]
    both = [
        [table, {**options, "start_percent": start, "end_percent": end}]
        for (table, options), (start, end) in zip(tables, windows, strict=True)
    ]
    found = maps(setting, both).values
    first, second = (maps(setting, [table]).values for table in tables)
    assert torch.equal(found[:2], first[:2]) and torch.equal(found[2:], second[2:])
    assert not torch.equal(first[2:], second[2:])


def test_the_seed_decides_the_noise_and_the_model_stays_as_it_is():
    setting = Setting()
    before, options = (
        sample(setting.model, setting.source, setting.empty, setting.latent),
        repr(setting.model.model_options),
    )
    state = torch.get_rng_state()
    first, again, other = (maps(setting, seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(before, sample(setting.model, setting.source, setting.empty, setting.latent))
    assert repr(setting.model.model_options) == options and not setting.model.wrappers


def test_a_patch_of_another_node_is_seen_too():
    """What it does to deeper layers shows in their maps."""
    from .test_replace import adapter

    setting = Setting()
    assert not torch.equal(maps(setting).values, maps(setting, model=adapter(setting.model)).values)


def test_what_cannot_be_looked_at_is_refused():
    setting = Setting()
    twice = setting.source + setting.target
    late = [[setting.source[0][0], {**setting.source[0][1], "start_percent": 0.5}]]
    area = [[setting.source[0][0], {**setting.source[0][1], "area": (4, 4, 0, 0)}]]
    pair = [[torch.cat([setting.source[0][0]] * 2), setting.source[0][1]]]
    for match, prompt in (("2 prompts hold at 0.125", twice), ("0 prompts hold at 0.125", late)):
        with pytest.raises(ValueError, match=match):
            looked_at(setting, prompt)
    with pytest.raises(ValueError, match="limited by area"):
        looked_at(setting, area)
    with pytest.raises(ValueError, match="single table"):
        looked_at(setting, pair)
    short = [[setting.source[0][0][:, :3], setting.source[0][1]]]
    with pytest.raises(ValueError, match="5 rows were asked for, the prompt has 3"):
        looked_at(setting, short)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_what_is_predicted_to_check_the_model_is_in_no_map(family, monkeypatch):
    from likeness.core.session import reuse

    setting, found = Setting(family), []
    for checked in (True, False):
        monkeypatch.setattr(reuse, "may_reuse", lambda _model, checked=checked: checked)
        found.append(maps(setting, levels=2).values)
    assert torch.equal(*found)
