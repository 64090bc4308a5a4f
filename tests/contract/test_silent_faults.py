"""What a model does to prompts and latents by itself: nothing is learned that a sampling would not see."""

from __future__ import annotations

import logging

import pytest
import torch

from ..tiny_families import families
from .methods import METHODS, run_node, sample
from .setting import Setting as NewSetting
from .setting import SharedSetting as Setting
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
def test_a_model_that_changes_the_tokens_gets_those_it_is_sampled_with(name, monkeypatch):
    setting = NewSetting()
    seen, own = [], setting.model.model.diffusion_model.forward

    def forward(*inputs, context, **more):
        seen.append(context.shape[1])
        return own(*inputs, context=context, **more)

    padding(setting, monkeypatch)
    monkeypatch.setattr(setting.model.model.diffusion_model, "forward", forward)
    METHOD[name].fit(setting, steps=1)
    assert set(seen) == {setting.source[0][0].shape[1] + 11}


@pytest.mark.usefixtures("own_folders")
def test_tokens_that_a_model_cuts_off_are_said_before_work(monkeypatch):
    setting = NewSetting()
    own = setting.model.model.diffusion_model.forward

    def forward(*inputs, context, **more):
        return own(*inputs, context=context[:, :-3], **more)

    monkeypatch.setattr(setting.model.model.diffusion_model, "forward", forward)
    with pytest.raises(RuntimeError, match="looks at 2 of the 5 tokens to be learned .* fewer tokens"):
        METHOD["hiper"].fit(setting)


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["sine", "siso"])
def test_layers_that_are_used_without_being_run_are_named(name, monkeypatch):
    setting = NewSetting()
    attention = setting.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1

    def fused(x, *_inputs, **_options):
        weights = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
        q, k, v = (part[:, None] for part in torch.nn.functional.linear(x, weights).chunk(3, -1))
        return attention.to_out(torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])

    monkeypatch.setattr(attention, "forward", fused)
    with pytest.raises(RuntimeError, match=r"3 of the 40 layers to be trained, such as .*attn1[._]to_.', are fused"):
        METHOD[name].fit(setting)


@pytest.mark.usefixtures("own_folders")
def test_a_video_is_not_an_image():
    family = families()["Wan"]
    setting = Setting()
    setting.model, setting.source = family.model(), family.prompt(1)
    setting.latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    with pytest.raises(ValueError, match="holds a video of 3 frames, expected images of one: encode a single image"):
        METHOD["hiper"].fit(setting)


def of_family(name: str) -> Setting:
    """A setting with the model, the prompts and the latent of a family."""
    family, setting = families()[name], Setting()
    setting.model, setting.source, setting.empty = family.model(), family.prompt(1), family.prompt(3)
    setting.latent = {"samples": family.latents()}
    return setting


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["Wan", "Cosmos-Predict2"])
def test_a_latent_without_a_frame_axis_is_one_frame(name, monkeypatch):
    """ComfyUI would broadcast it to a video of as many frames as it has channels."""
    setting, shapes = of_family(name), set()
    own = setting.model.model.diffusion_model.forward

    def forward(x, *inputs, **more):
        shapes.add(tuple(x.shape))
        return own(x, *inputs, **more)

    monkeypatch.setattr(setting.model.model.diffusion_model, "forward", forward)
    setting.latent["samples"] = setting.latent["samples"][:, :, 0]
    METHOD["hiper"].fit(setting, steps=1)
    assert shapes == {(1, 16, 1, 4, 4)}


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["Chroma", "Z-Image"])
def test_no_word_of_a_prompt_without_padding_is_replaced(name):
    """Its last tokens are words; five of five were refused, and an empty prompt of one token gave one of four."""
    from likeness.nodes.embedding import LikenessApplyEmbedding

    setting = of_family(name)
    setting.source = [[setting.source[0][0][:, :5], setting.source[0][1]]]
    embedding = METHOD["hiper"].fit(setting, steps=1)[0]
    inputs = {"conditioning": setting.source, "embedding": embedding, "scale": 1.0, "step": 0}
    ((tokens, _),) = run_node(LikenessApplyEmbedding, **inputs)[0]
    assert tokens.shape[1] == 10 and torch.equal(tokens[:, :5], setting.source[0][0])
    setting.empty = [[setting.empty[0][0][:, :1], setting.empty[0][1]]]
    more = METHOD["hiper"].fit(setting, init="empty prompt", negative=setting.empty, tokens=4, steps=1)[0]
    assert more.tokens == 4


def test_all_attention_layers_of_both_streams_get_a_lora():
    """HiDream's text stream and its outputs have names of their own."""
    from likeness.core.lora.host.layers import trained_layers

    names = {name.rpartition(".")[2] for name in trained_layers(families()["HiDream"].model().model).layers}
    assert names == {f"to_{part}{stream}" for part in ("q", "k", "v", "out") for stream in ("", "_t")}


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
    from likeness.core.session.checkpointing import checkpointed

    with caplog.at_level(logging.WARNING, "likeness"), checkpointed(torch.nn.Linear(2, 2)):
        pass
    assert "Checkpointing saves nothing" in caplog.text


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize("name", ["hiper", "hifi", "step-wise", "null-text", "reference"])
def test_a_rate_too_low_for_the_size_of_the_tokens_is_said(name, caplog):
    """Where a text encoder's numbers are large, a thousand updates at the published rate change nothing: on the
    toyworld's flow transformer HiPer learned nothing and said nothing.
    """
    method, setting = METHOD[name], Setting()
    method.fit(setting, steps=1, learning_rate=0.01)
    assert "next to nothing is learned" not in caplog.text
    setting.source, setting.empty = ([[300 * rows, more]] for ((rows, more),) in (setting.source, setting.empty))
    method.fit(setting, steps=1, learning_rate=0.01)
    assert caplog.text.count("learning_rate is 0.01, and this prompt's tokens are numbers of about 3e+02") == 1
    assert "Try a rate of about 3, a hundredth of their size" in caplog.text
