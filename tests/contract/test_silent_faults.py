"""What a model does to prompts and latents by itself: nothing is learned that a sampling would not see."""

from __future__ import annotations

import logging

import pytest
import torch

from likeness.core.fit.fit import gradient_or_raise
from likeness.core.session.session import GuiderDenoiser, check_tokens

from .methods import METHODS, Setting, run_node, sample
from .test_guidance import other_loader

METHOD = {method.name: method for method in METHODS}


def padding(setting: Setting, monkeypatch) -> None:
    """The model pads its prompts with zeros on the left, as FLUX.2 does."""
    own = setting.model.model.extra_conds

    def extra_conds(**inputs):
        conds = own(**inputs)
        if "c_crossattn" in conds:
            padded = torch.nn.functional.pad(conds["c_crossattn"].cond, (0, 0, 11, 0))
            conds["c_crossattn"] = conds["c_crossattn"]._copy_with(padded)
        return conds

    monkeypatch.setattr(setting.model.model, "extra_conds", extra_conds)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "step-wise", "null-text", "reference"])
def test_a_model_that_changes_the_tokens_is_refused_before_work(name, monkeypatch):
    setting = Setting()
    padding(setting, monkeypatch)
    with pytest.raises(RuntimeError, match=r"prepares the tokens of a prompt by itself .* no effect"):
        METHOD[name].fit(setting)


def test_the_tokens_are_those_of_the_prompt():
    rows = torch.randn(1, 7, 4)

    class Denoiser(GuiderDenoiser):
        def __init__(self, context: torch.Tensor) -> None:
            self.given = context

        @property
        def context(self) -> torch.Tensor:
            return self.given

    check_tokens(Denoiser(rows.half()), rows)
    for other in (rows + 1, torch.cat([rows, rows], 1)):
        with pytest.raises(RuntimeError, match="prepares the tokens"):
            check_tokens(Denoiser(other), rows)


def test_tokens_behind_the_models_mask_are_said():
    gradient_or_raise(torch.tensor([0.0, 1e-9]), 0)
    gradient_or_raise(torch.zeros(2), 3)
    with pytest.raises(RuntimeError, match="get no gradient, expected is a model that looks at the end of a prompt"):
        gradient_or_raise(torch.zeros(2), 0)


@pytest.mark.usefixtures("own_folders")
def test_latents_with_a_time_axis_are_refused(monkeypatch):
    setting = Setting()
    monkeypatch.setattr(setting.model.model.latent_format, "latent_dimensions", 3)
    with pytest.raises(ValueError, match=r"have a time axis, the latent is \(1, 4, 8, 8\), expected is a model"):
        METHOD["hiper"].fit(setting)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        ("flux", {"negative": [[torch.zeros(1, 77, 96), {}]]}, "'negative' has tokens of width 96, expected 64"),
        ("sd1", {"negative": [[torch.zeros(1, 77, 96), {}]]}, "'negative' has tokens of width 96, expected 768"),
        ("flux", {"latent": {"samples": torch.zeros(1, 16, 1, 8, 8)}}, r"\(1, 16, 1, 8, 8\), expected 4 axes"),
    ],
)
def test_what_belongs_to_another_model_is_refused_before_work(family, given, said):
    """Also by a model whose configuration does not tell the width of its tokens: all prompts of a node are alike."""
    with pytest.raises(ValueError, match=said):
        METHOD["siso"].fit(Setting(family), **given)


def test_the_tuned_prompt_is_processed_by_the_tuned_network(monkeypatch):
    """A LoRA may lie on a part that is for prompts alone, as Anima's adapter is."""
    import comfy.samplers

    from likeness.core.sine.host.overlay import Overlay
    from likeness.nodes.guidance import LikenessGuidance

    active, seen = [], []
    own_active, own_process = Overlay.active, comfy.samplers.process_conds

    def noted(overlay):
        active.append(True)
        return own_active(overlay)

    def process(*given, **named):
        seen.append(len(active))
        return own_process(*given, **named)

    monkeypatch.setattr(Overlay, "active", noted)
    monkeypatch.setattr(comfy.samplers, "process_conds", process)
    setting = Setting()
    links = {"model": setting.model, "tuned": other_loader(1), "tuned_positive": setting.target}
    values = {"base_weight": 0.7, "end_percent": 0.6, "start_percent": 0.0, "k_timestep": -1, "allow_over_one": False}
    guided = run_node(LikenessGuidance, **links, **values)[0]
    sample(guided, setting.source, setting.empty, setting.latent, steps=2)
    assert seen[-1] == 1 and len(active) > 1, "the network was not active when its prompt was processed"


def test_checkpointing_that_saves_nothing_is_said(caplog):
    from likeness.core.session.weights import checkpointed

    with caplog.at_level(logging.WARNING, "likeness"), checkpointed(torch.nn.Linear(2, 2)):
        pass
    assert "Checkpointing saves nothing" in caplog.text
