"""Presets take the place of a node's inputs, and the published one is the paper's; a loss that rises is noticed."""

from __future__ import annotations

import pytest
import torch

from likeness.core.embedding.hiper import HiPerSettings
from likeness.core.embedding.presets import SOURCE, presets_for
from likeness.core.fit.fit import rises
from likeness.core.fit.presets import AS_SET, FAST, FLOW, NOISE, PUBLISHED, apply_preset
from likeness.core.prompt.conditioning import size_of
from likeness.core.siso.presets import SISO
from likeness.core.siso.siso import ITERATIONS, RANK, SisoSettings

HIPER = presets_for(torch.full((1, 3, 4), 0.5))
AS_ON_THE_NODE = {"steps": 7, "learning_rate": 0.5, "tokens": 2, "seed": 3, "anchor_weight": 0.2}


def test_as_set_changes_nothing(caplog):
    caplog.set_level("INFO")
    assert apply_preset(HIPER, AS_SET, NOISE, AS_ON_THE_NODE) == AS_ON_THE_NODE and not caplog.text


@pytest.mark.parametrize("kind", [NOISE, FLOW])
def test_published_is_the_papers(kind, caplog):
    """Of the authors: n_hiper 5 and learning rate 5e-3 in script.sh; inference.py takes step 1000, saved every 100."""
    caplog.set_level("INFO")
    inputs = apply_preset(HIPER, PUBLISHED, kind, AS_ON_THE_NODE)
    published = {"steps": 1000, "learning_rate": 5e-3, "tokens": 5, "save_every": 100, "init": SOURCE}
    off = {"start_percent": 0.0, "end_percent": 1.0, "anchor_weight": 0.0}
    assert inputs == {**published, **off, "seed": 3}
    settings = HiPerSettings()  # the one that tests/parity compares with the authors' numbers
    assert all(inputs[name] == getattr(settings, name) for name in ("tokens", "learning_rate"))
    assert "sets steps 1000, learning_rate 0.005, tokens 5" in caplog.text


def test_fast_needs_fewer_steps_at_a_higher_rate():
    for kind in (NOISE, FLOW):
        inputs = apply_preset(HIPER, FAST, kind, AS_ON_THE_NODE)
        assert inputs["steps"] <= 300 and inputs["learning_rate"] == {NOISE: 0.04, FLOW: 0.015}[kind]
        assert inputs["seed"] == 3 and inputs["anchor_weight"] == 0.2


def test_the_rate_of_fast_on_flow_models_follows_the_size_of_the_prompts_numbers():
    rows = torch.randn(1, 9, 4096, generator=torch.Generator().manual_seed(0))
    rows[:, 0] *= 500  # the first token of many language models
    rows[:, 7:] = 0.0  # masked padding
    assert 0.98 < size_of(rows) < 1.02 and size_of(torch.zeros(1, 2, 3)) == 1.0
    for scale, rate in ((0.2, 0.006), (1.0, 0.03), (20.0, 0.6)):
        inputs = apply_preset(presets_for(scale * rows), FAST, FLOW, AS_ON_THE_NODE)
        assert inputs["learning_rate"] == rate and inputs["start_percent"] == 0.0


@pytest.mark.parametrize("kind, decay, text", [(NOISE, 1e-2, (2e-4, 1e-2)), (FLOW, 1e-4, (5e-6, 1e-3))])
def test_sisos_published_is_the_authors_and_its_fast_draws_half(kind, decay, text):
    """Their scripts for SDXL-turbo and FLUX.1-schnell: rank 4, 50 images, patience 7, threshold 3 %."""
    inputs = apply_preset(SISO, PUBLISHED, kind, {"iterations": 9, "rank": 8, "keep": "last", "noise": "new"})
    own = {"weight_decay": decay, "text_rate": text[0], "text_decay": text[1], "keep": "last", "noise": "same"}
    stop = {"threshold": 3.0, "patience": 7, "optimizer": "AdamW"}
    assert inputs == {"iterations": 50, "learning_rate": 2e-4, "rank": 4, **own, **stop}
    assert (inputs["iterations"], inputs["rank"]) == (ITERATIONS, RANK)
    if kind == NOISE:  # the defaults, which tests/parity compares with the authors' numbers
        settings = SisoSettings()
        assert all(inputs[name] == getattr(settings, name) for name in inputs.keys() & vars(settings).keys())
    fast = apply_preset(SISO, FAST, kind, inputs)
    assert fast["iterations"] == 25 and fast["learning_rate"] == 3e-4 and fast["noise"] == "same"


def test_a_kind_without_a_preset_gets_the_nearest_and_the_log_says_so(caplog):
    table = {FAST: {NOISE: {"steps": 5}}}
    assert apply_preset(table, FAST, FLOW, {"steps": 9}) == {"steps": 5}
    assert "'fast' was not measured on flow models: the nearest one is taken" in caplog.text


def losses(count: int, factor: float, seed: int) -> list[float]:
    """Of random timesteps, a hundredfold apart; times `factor` in the second half."""
    logs = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 4.6 - 5
    logs[count // 2 :] += torch.tensor(factor).log()
    return logs.exp().tolist()


def test_a_rise_is_told_from_the_spread_over_timesteps():
    assert all(rises(losses(200, 5.0, seed)) for seed in range(20))
    assert not any(rises(losses(200, factor, seed)) for factor in (1.0, 0.7) for seed in range(200))
    assert not rises([]) and not rises([1.0, 2.0, 3.0]) and not rises([0.5] * 100)
