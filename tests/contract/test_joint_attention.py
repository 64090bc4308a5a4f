"""Prompt-to-prompt and attention maps in transformers: where the words are is asked of the model and its encoders."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from .. import tiny_models
from .methods import run_node
from .test_families import FAMILIES as SMALL

# Of 16 places of the image, which the tests tell apart.
FAMILIES = {
    name: dataclasses.replace(family, latent=(*family.latent[:-2], 8, 8)) if family.size == (32, 32) else family
    for name, family in SMALL.items()
}

PLACES = {  # where the first of the prompt's tokens is among the keys, and the image's first among the queries
    **{"SD3.5": (0, 154), "FLUX.1": (0, 256), "FLUX.2": (471, 512), "Chroma": (0, 13), "Z-Image": (0, 32)},
    **{"Lumina2": (0, 21), "Qwen-Image": (0, 21), "Qwen-Image-Edit": (0, 21), "HiDream": (16, 0), "AuraFlow": (8, 264)},
    **{"OmniGen2": (0, 21), "HunyuanVideo": (16, 0), "Wan": (0, 0), "Cosmos-Predict2": (0, 0), "LTXV": (0, 0)},
}
NEWER = {"HunyuanVideo": (0, 21)}  # of newer ComfyUI
OWN_LAYERS = ("Wan", "Cosmos-Predict2", "LTXV")  # for the prompt
HIDDEN = [name for name in FAMILIES if name not in PLACES]
each_family = pytest.mark.parametrize("name", [name for name in FAMILIES if name in PLACES])
PROMPTS = ("a cat", "a dog")
WORD = 3  # the token that differs


def pair(family, change: bool = True) -> tuple:
    """The source's prompt, the edit's, and both as Replace Subject joins them."""
    from likeness.core.attention.host.swapped_prompt import pair_prompts

    source, edit = family.prompt(1), family.prompt(1)
    if change:
        edit[0][0][:, WORD] = torch.randn(family.width, generator=torch.Generator().manual_seed(9))
    return source, edit, pair_prompts(source, edit, None, PROMPTS)


def controlled(model, positive, **more):
    from likeness.core.attention.host.prompt_to_prompt import Control, SubjectSwap, with_control
    from likeness.core.attention.prompt_to_prompt import Swap

    request = SubjectSwap(PROMPTS[0], "cat", "dog", **more)
    return with_control(model, Control(request, PROMPTS, (Swap(WORD, 1, 1),), positive[0][0].shape[1]))


def by_hand(model, family, name: str, places: tuple[int, int]):
    """Prompt-to-prompt on whole tables of attention, at the places that the families are known to have."""
    tokens, (text, image), cells = family.prompt(1)[0][0].shape[1], places, 16
    columns = torch.tensor([text + i for i in range(tokens) if i != WORD])
    rows = torch.arange(image, image + cells)[:, None]

    def hook(function, q, k, v, heads, *more, **named):
        out = function(q, k, v, heads, *more, **named)
        if not named.get("skip_reshape"):
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        own = [i for i, kind in enumerate(named["transformer_options"]["cond_or_uncond"]) if kind == 0]
        lengths = q.shape[2], k.shape[2]
        joint = lengths[0] == lengths[1] >= tokens + cells
        if not own or not (lengths == (cells, tokens) if name in OWN_LAYERS else joint):
            return out
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mask = named.get("mask", more[0] if more else None)
        if mask is not None:
            mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape) if mask.ndim != 3 else mask[:, None]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        table = scores.softmax(-1)
        source, edit = table[2 * own[0]], table[2 * own[0] + 1]
        edit[:, rows, columns] = source[:, rows, columns]
        made = table @ v
        return made if named.get("skip_output_reshape") else made.transpose(1, 2).flatten(2)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = hook
    return clone


def play(family, model, positive, images: int, cfg: float = 3.0, steps: int = 2) -> torch.Tensor:
    import comfy.samplers

    noise = family.latents(2).repeat(images, *[1] * (len(family.latent) - 1))
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, family.prompt(3))
        guider.set_cfg(cfg)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), euler, levels, seed=0, disable_pbar=True)


@each_family
def test_it_is_prompt_to_prompt_written_out_and_the_source_stays(name):
    family = FAMILIES[name]
    model = family.model()
    source, edit, both = pair(family)
    alone = [play(family, model, prompt, 1) for prompt in (source, edit)]
    found = play(family, controlled(model, both), both, 2)
    near, effect = 1e-5 * float(alone[0].std()), float((found[1:] - alone[1]).abs().mean())
    assert float((found[:1] - alone[0]).abs().mean()) < near
    places = {PLACES[name], NEWER.get(name, PLACES[name])}
    written = [play(family, by_hand(model, family, name, each), both, 2) for each in places]
    error = min(float((found - each).abs().mean()) for each in written)
    assert error < near and error < 0.1 * effect, (error, effect)
    _, _, same = pair(family, change=False)
    twice = play(family, controlled(model, same), same, 2)
    assert float((twice[:1] - twice[1:]).abs().mean()) < near


@pytest.mark.parametrize("name", HIDDEN)
def test_what_does_not_show_its_attention_is_refused_before_the_first_step(name):
    family, refusal = FAMILIES[name], "do not show what of the image looks at which token|carry t5xxl_ids of one image"
    with pytest.raises(ValueError, match=refusal):
        _, _, both = pair(family)
        play(family, controlled(family.model(), both), both, 2)


@each_family
def test_the_maps_are_the_models_own_attention(name):
    """All tokens of a prompt get what the image leaves: 1 in layers of their own, less where it looks at itself too."""
    from likeness.core.attention.host.maps import attention_maps

    family = FAMILIES[name]
    prompt, tokens = family.prompt(1), family.prompt(1)[0][0].shape[1]
    with torch.inference_mode():
        found = attention_maps(family.model(), prompt, {"samples": family.latents()}, tokens, 2, 0).values
        few = attention_maps(family.model(), prompt, {"samples": family.latents()}, 3, 2, 0).values
    assert found.shape == (2, tokens, *family.latent[-2:])
    torch.testing.assert_close(few, found[:, -3:])
    total = found.sum(1)
    if name in OWN_LAYERS:
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert float(total.min()) > 0 and float(total.max()) < 1
    assert len({float(value.sum()) for value in found.flatten(0, 1)[:3]}) > 1


@pytest.mark.parametrize("name", HIDDEN)
def test_what_does_not_show_its_attention_has_no_maps(name):
    from likeness.nodes.inspect import LikenessInspect

    family = FAMILIES[name]
    inputs = {"model": family.model(), "conditioning": family.prompt(1), "latent": {"samples": family.latents()}}
    with pytest.raises(ValueError, match="do not show what of the image looks at which token"):
        run_node(LikenessInspect, **inputs, tokens=3, columns=1, seed=0)


def test_blend_keeps_the_source_away_from_the_word_and_a_mask_where_it_is_black():
    family = FAMILIES["FLUX.1"]
    model, (_, _, both) = family.model(), pair(family)
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    free, masked, blended = (
        play(family, controlled(model, both, **more), both, 2, steps=3) for more in ({}, {"mask": mask}, {"blend": 0.5})
    )
    same = [each[0].isclose(each[1], atol=1e-5).all(0) for each in (free, masked, blended)]
    assert not bool(same[0].any())
    assert bool(same[1][:, :4].all()) and not bool(same[1][:, 4:].any())
    assert 0 < int(same[2].sum()) < 64


def test_renormalised_attention_sums_to_one_with_the_image():
    family = FAMILIES["FLUX.1"]
    model, (_, _, both) = family.model(), pair(family)
    plain, divided = (play(family, controlled(model, both, renormalise=on), both, 2) for on in (False, True))
    assert torch.equal(plain[0], divided[0]) and not torch.equal(plain[1], divided[1])


def test_other_hooks_stay_and_an_evaluation_that_is_not_seen_is_refused():
    family = FAMILIES["FLUX.1"]
    model, (_, _, both) = family.model(), pair(family)
    calls = []

    def other(function, *args, **named):
        calls.append(1)
        return function(*args, **named)

    hooked = model.clone()
    hooked.model_options["transformer_options"]["optimized_attention_override"] = other
    patched = controlled(hooked, both)
    assert torch.equal(play(family, patched, both, 2), play(family, controlled(model, both), both, 2)) and calls
    assert patched.model_options["transformer_options"] == {"optimized_attention_override": other}
    area = [[rows, {**options, "area": (4, 4, 0, 0)}] for rows, options in both]
    with pytest.raises(RuntimeError, match="is not seen: a node on the model cuts"):
        play(family, controlled(model, both), area, 2)


class Encoder:
    """A text encoder that gives each character an embedding. back: it looks back only. pads: to this many tokens;
    masked: which it does not look at. cut: tokens of a template in front that it leaves out.
    """

    def __init__(self, back: bool, pads: int = 0, masked: bool = False, cut: int = 0, pooled: bool = False) -> None:
        self.back, self.pads, self.masked, self.cut, self.pooled = back, pads, masked, cut, pooled

    def tokens(self, text: str) -> list:
        found = [(i + 1, 1.0, 7) for i in range(self.cut)] + [(ord(each), 1.0, 1) for each in text] + [(2, 1.0, 0)]
        return found + [(0, 1.0, 0)] * (self.pads - len(found))

    def rows(self, tokens: list) -> torch.Tensor:
        ids = torch.tensor([each[0] for each in tokens])
        table = torch.randn(200, 8, generator=torch.Generator().manual_seed(self.pads), dtype=torch.float64)[ids]
        used = (ids > 0).double()[:, None] if self.masked else 1.0
        mixed = (table * used).cumsum(0) if self.back else table + (table * used).mean(0, keepdim=True)
        return (mixed * used)[None, self.cut :]


class Encoders:
    """As a CLIP, with several text encoders."""

    def __init__(self, **encoders: Encoder) -> None:
        self.encoders = encoders

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict:
        found = {name: [encoder.tokens(text)] for name, encoder in self.encoders.items()}
        return found if return_word_ids else {name: [[t[:2] for t in found[name][0]]] for name in found}

    def encode_from_tokens_scheduled(self, tokens: dict) -> list:
        rows = [encoder.rows(tokens[name][0]) for name, encoder in self.encoders.items() if not encoder.pooled]
        return [[torch.cat(rows, 1), {"pooled_output": None}]]


def swaps_of(clip, source: str, edit: str, learned=None) -> tuple:
    from likeness.core.attention.host.swapped_prompt import encode_prompts, encoder_swaps

    return encoder_swaps(clip, (source, edit), *encode_prompts(clip, (source, edit)), learned)


PADS = {"back": False, "pads": 30}


@pytest.mark.parametrize(
    ("clip", "edit", "swaps"),
    [
        (Encoders(t5=Encoder(**PADS)), "my dog sat", [(3, 3, 3, 30)]),
        (Encoders(l=Encoder(True, 20, pooled=True), t5=Encoder(**PADS)), "my horse sat", [(3, 3, 5, 30)]),
        (Encoders(l=Encoder(True, 20), t5=Encoder(**PADS)), "my horse sat", [(3, 3, 5, 20), (23, 3, 5, 50)]),
        (Encoders(t5=Encoder(**PADS, masked=True)), "my dog sat", [(3, 3, 3, 30)]),
        (Encoders(qwen=Encoder(True, cut=4)), "my dog sat", [(3, 3, 3, 11)]),
        (Encoders(qwen=Encoder(True, cut=4)), "my cat sat", []),
        (Encoders(t5=Encoder(False)), "my cot sat", [(4, 1, 1, 11)]),
    ],
)
def test_a_word_is_found_in_the_tokens_of_each_text_encoder(clip, edit, swaps):
    found = swaps_of(clip, "my cat sat", edit)
    assert [(swap.start, swap.old, swap.new, swap.end) for swap in found] == swaps


def test_prompts_of_different_lengths_and_appended_subjects_are_refused():
    from likeness.core.attention.host.swapped_prompt import LearnedSubject
    from likeness.core.embedding.artifact import Embedding

    qwen, t5 = Encoders(qwen=Encoder(True, cut=4)), Encoders(t5=Encoder(**PADS))
    with pytest.raises(ValueError, match="choose a replacement of 3 tokens, not 5"):
        swaps_of(qwen, "my cat sat", "my horse sat")
    appended, tail = (
        LearnedSubject(Embedding({1: torch.ones(1, 5, 8)}, {"placement": placement}))
        for placement in ("append", "tail")
    )
    with pytest.raises(ValueError, match="is appended to prompts of this text encoder.*leave it out"):
        swaps_of(qwen, "my cat sat", "my dog sat", appended)
    assert swaps_of(t5, "my cat sat", "my dog sat", tail)
    with pytest.raises(ValueError, match="leaves only 2 unused: shorten the prompt by 3"):
        swaps_of(t5, "my cat sat" + 17 * "x", "my dog sat" + 17 * "x", tail)


def test_an_inverted_image_is_edited_on_a_flow_model():
    """From the image's own text encoder to the two images, by the nodes' outputs as they are connected."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    from likeness.nodes.inversion import LikenessInvert, LikenessNullText
    from likeness.nodes.replace import LikenessReplaceSubject

    family, clip, text = FAMILIES["Z-Image"], tiny_models.clip_qwen(64), "a photo of a cat on the grass"
    model = family.model()
    with torch.inference_mode():
        source, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(each)) for each in (text, ""))
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
    image = {"samples": family.latents()}
    inputs = {"model": model, "positive": source, "sigmas": levels, "label": "published", "latent": image}
    trajectory, latent, _, noise, _ = run_node(LikenessInvert, **inputs)
    settings = {"cfg": 4.0, "start": "prompt", "inner_steps": 1, "method": "direct edit"}
    shared = {"model": model, "positive": source, "negative": empty, "trajectory": trajectory}
    negative, _, _, pinned = run_node(LikenessNullText, **shared, **settings)
    swap = {"clip": clip, "latent": latent, "negative": negative, "prompt": text, "word": "cat", "end_percent": 1.0}
    patched, positive, negative, both, _ = run_node(LikenessReplaceSubject, model=pinned, **swap, replacement="dog")
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    guider.set_cfg(4.0)
    euler = comfy.samplers.sampler_object("euler")
    sampling = {"noise": noise, "guider": guider, "sampler": euler, "sigmas": levels, "latent_image": both}
    found = run_node(SamplerCustomAdvanced, **sampling)[0]["samples"]
    torch.testing.assert_close(found[:1], image["samples"], atol=1e-4, rtol=0)
    assert float((found[1:] - found[:1]).abs().mean()) > 1e-3
    with pytest.raises(ValueError, match=r"choose a replacement of 1 tokens, not \d"):
        run_node(LikenessReplaceSubject, model=pinned, **swap, replacement="hippopotamus calf")
    with pytest.raises(ValueError, match="does not have: set it to 0"):
        run_node(LikenessReplaceSubject, model=pinned, **swap, replacement="dog", self_percent=0.4)
