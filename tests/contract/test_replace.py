"""Replacing a subject in ComfyUI: whose attention is taken, when, and beside whom."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from .. import tiny_models
from .methods import Setting, run_node
from .remembering import Remembering

STEPS = 3
PROMPT, WORD = "a photo of a cat on the grass", "cat"


@functools.cache
def text_encoder(family: str):
    """The family's own, small and random."""
    names = {"sd1": "clip_l", "sd2_v": "clip_h", "sdxl": "clip_xl"}
    return Remembering(getattr(tiny_models, names[family])())


@pytest.fixture(scope="module")
def clip():
    return text_encoder("sd1")


@functools.cache
def _setting(family: str) -> Setting:
    return Setting(family)


def setting_of(family: str = "sd1") -> Setting:
    """The family's, its network made once: no test here changes weights or prompts."""
    return copy.copy(_setting(family))


def sigmas(model, steps: int = STEPS) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", steps)


def swapped(setting, clip, **changes) -> tuple:
    """Model, positive, negative, latent."""
    return outputs(setting, clip, **changes)[:4]


def outputs(setting, clip, **changes) -> tuple:
    from likeness.nodes.replace import LikenessReplaceSubject

    start = {"samples": 14 * setting.latent["samples"] / 0.18215}
    inputs = {"model": setting.model, "clip": clip, "latent": start, "negative": setting.empty, "prompt": PROMPT}
    inputs |= {"word": WORD, "replacement": "dog", "end_percent": 1.0}
    return run_node(LikenessReplaceSubject, **{**inputs, **changes})


def play(model, positive, negative, latent, sampler: str = "euler", guider=None) -> torch.Tensor:
    import comfy.samplers

    with torch.inference_mode():
        guider = guider or comfy.samplers.CFGGuider(model)
        if type(guider) is comfy.samplers.CFGGuider:
            guider.set_conds(positive, negative)
            guider.set_cfg(4.0)
        samples = latent["samples"]
        made = comfy.samplers.sampler_object(sampler)
        return guider.sample(torch.zeros_like(samples), samples, made, sigmas(model), seed=0, disable_pbar=True)


def controlled_by(setting, positive, swap, **more):
    """A model whose control is made by hand."""
    from likeness.core.attention.host.prompt_to_prompt import KEY, Control, SubjectSwap, with_control

    request = SubjectSwap(PROMPT, WORD, "dog", **more)
    return with_control(setting.model, Control(request, positive[0][1][KEY], (swap,), 77))


class Corrections:
    """Counts the calls of core's correction()."""

    def __init__(self, monkeypatch) -> None:
        from likeness.core.attention.host import layers as attention_control

        self.count, original = 0, attention_control.correction

        def counted(*args):
            self.count += 1
            return original(*args)

        monkeypatch.setattr(attention_control, "correction", counted)


def layers(setting) -> int:
    from likeness.core.attention.host.layers import transformer_layers

    return len(transformer_layers(setting.model.model.diffusion_model))


def close(a, b, atol: float = 2e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def by_hand(setting, columns: list[int], until: float = 0.0, self_until: float = float("inf")):
    """Prompt-to-prompt written out for equally long words: a MODEL with stock patches on every layer."""
    from likeness.core.attention.host.layers import transformer_layers

    def softmax(q, k, heads):
        q, k = (each.view(*each.shape[:2], heads, -1).permute(0, 2, 1, 3) for each in (q, k))
        return torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)

    def attend(q, k, v, options, change):
        heads = options["n_heads"]
        a = softmax(q, k, heads)
        at = [2 * index for index, kind in enumerate(options["cond_or_uncond"]) if kind == 0]
        for first in at:
            change(a, first, float(options["sigmas"][0]))
        out = a @ v.view(*v.shape[:2], heads, -1).permute(0, 2, 1, 3)
        return out.permute(0, 2, 1, 3).flatten(2)

    def cross(a, first, sigma):
        for j in range(77):
            if j not in columns and sigma > until:
                a[first + 1, :, :, j] = a[first, :, :, j]

    def of_self(a, first, sigma):
        if sigma > self_until:
            a[first + 1] = a[first]

    clone = setting.model.clone()
    for key in transformer_layers(setting.model.model.diffusion_model):
        clone.set_model_attn2_replace(lambda q, k, v, o: attend(q, k, v, o, cross), *key)
        clone.set_model_attn1_replace(lambda q, k, v, o: attend(q, k, v, o, of_self), *key)
    return clone


@pytest.mark.parametrize(("family", "end"), [("sd1", 0.7), *((family, 1.0) for family in tiny_models.FAMILIES)])
def test_it_is_prompt_to_prompt_written_out(family, end):
    """Word and tail columns of its own, everything else the source's; without and with self-attention to 0.4."""
    setting, clip = setting_of(family), text_encoder(family)
    level, edits = setting.model.get_model_object("model_sampling").percent_to_sigma, []
    _, positive, negative, latent = swapped(setting, clip)
    rows, options = positive[0]
    assert all(len(both) == 2 and not torch.equal(*both) for both in (rows, options["pooled_output"]))
    plain = play(setting.model, positive, negative, latent)
    for share in (0.0, 0.4) if family == "sd1" else (0.4,):
        model, positive, *_ = swapped(setting, clip, end_percent=end, self_percent=share)
        found = play(model, positive, negative, latent)
        close(found, play(by_hand(setting, [5], level(end), level(share)), positive, negative, latent))
        assert torch.equal(found[0], plain[0]) and float((found[1] - plain[1]).abs().mean()) > 1e-3
        edits.append(found[1])
    assert float((edits[0] - edits[-1]).abs().mean()) > 1e-3 or family != "sd1"


def test_nothing_of_its_own_and_equal_prompts_give_the_same_picture_twice(clip):
    from likeness.core.attention.prompt_to_prompt import Swap

    setting = setting_of()
    _, positive, negative, latent = swapped(setting, clip, replacement=WORD)
    found = play(controlled_by(setting, positive, Swap(0, 0, 0)), positive, negative, latent)
    assert torch.equal(found[0], found[1])


def test_all_columns_of_its_own_are_the_unpatched_pass(clip):
    from likeness.core.attention.prompt_to_prompt import Swap

    setting = setting_of()
    _, positive, negative, latent = swapped(setting, clip)
    found = play(controlled_by(setting, positive, Swap(0, 77, 77)), positive, negative, latent)
    assert torch.equal(found, play(setting.model, positive, negative, latent))


def test_a_longer_word_moves_the_rest_and_renormalising_changes_it(clip):
    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip, replacement="hippopotamus calf")
    longer = play(model, positive, negative, latent)
    plain = play(setting.model, positive, negative, latent)
    assert torch.equal(longer[0], plain[0]) and float((longer[1] - plain[1]).abs().mean()) > 1e-3
    other = swapped(setting, clip, replacement="hippopotamus calf", renormalise=True)
    assert float((play(*other)[1] - longer[1]).abs().mean()) > 1e-4


def test_the_reconstruction_is_the_single_picture(clip):
    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    with torch.inference_mode():
        source = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    single = play(setting.model, source, negative, {"samples": latent["samples"][:1]})
    close(play(model, positive, negative, latent)[:1], single, atol=1e-3)


def test_prompts_that_come_in_separate_calls_give_the_same(clip, monkeypatch):
    setting = setting_of()
    found = swapped(setting, clip)
    together = play(*found)
    monkeypatch.setattr(type(setting.model.model), "memory_required", lambda *_args, **_more: 1e30)
    close(play(*found), together)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "uni_pc"])
def test_it_ends_where_it_should_with_every_sampler(clip, monkeypatch, name):
    setting = setting_of()
    counted, seen = Corrections(monkeypatch), []

    def record(executor, model, conds, x, timestep, model_options):
        seen.append(float(timestep.max()))
        return executor(model, conds, x, timestep, model_options)

    model, *rest = swapped(setting, clip, end_percent=0.5)
    model.add_wrapper_with_key("calc_cond_batch", "test", record)
    play(model, *rest, sampler=name)
    limit = setting.model.get_model_object("model_sampling").percent_to_sigma(0.5)
    held = [sigma for sigma in seen if sigma > limit]
    assert counted.count == layers(setting) * len(held) and 0 < len(held) < len(seen)


def test_only_the_positive_prompt_is_controlled_in_any_guider(clip, monkeypatch):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    setting = setting_of()
    counted = Corrections(monkeypatch)
    model, positive, negative, latent = swapped(setting, clip)
    guider = Guider_DualCFG(model)
    guider.set_conds(positive, setting.target, negative)
    guider.set_cfg(4.0, 2.0)
    play(model, positive, negative, latent, guider=guider)
    assert counted.count == layers(setting) * STEPS


def test_the_negative_prompt_is_not_controlled_where_the_positive_one_has_an_area(clip, monkeypatch):
    """ComfyUI gives the negative prompt an entry for it, with the positive one's name and options."""
    setting = setting_of()
    counted = Corrections(monkeypatch)
    model, positive, negative, latent = swapped(setting, clip)
    plain = play(model, positive, negative, latent)
    whole = [[rows, {**options, "area": (8, 8, 0, 0)}] for rows, options in positive]
    close(play(model, whole, negative, latent), plain)
    assert counted.count == 2 * layers(setting) * STEPS


def test_the_positive_prompt_is_controlled_where_the_negative_one_has_an_area(clip, monkeypatch):
    """ComfyUI gives the positive prompt an entry for it, with the negative one's name and options."""
    setting = setting_of()
    counted = Corrections(monkeypatch)
    model, positive, negative, latent = swapped(setting, clip)
    plain = play(model, positive, negative, latent)
    whole = [[rows, {**options, "area": (8, 8, 0, 0)}] for rows, options in negative]
    close(play(model, positive, whole, latent), plain)
    assert counted.count == 3 * layers(setting) * STEPS  # the positive one is asked twice, with and without the area


def test_a_longer_negative_prompt_may_have_an_area(clip):
    """What counts are the rows of the prompt that is evaluated, not those of the prompt that the area is from."""
    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    longer = [[torch.cat([rows, rows], 1), options] for rows, options in negative]
    plain = play(model, positive, longer, latent)
    whole = [[rows, {**options, "area": (8, 8, 0, 0)}] for rows, options in longer]
    close(play(model, positive, whole, latent), plain)


def adapter(model, strength: float = 0.5):
    """An attn2 replace on every layer as IPAdapter has it: the text's attention plus that to an image's tokens."""
    from comfy.ldm.modules.attention import optimized_attention

    from likeness.core.attention.host.layers import transformer_layers

    def patch(q, k, v, options):
        generator = torch.Generator().manual_seed(q.shape[-1])
        tokens = torch.randn(2, 1, 4, q.shape[-1], generator=generator).expand(-1, q.shape[0], -1, -1)
        out = optimized_attention(q, k, v, options["n_heads"])
        return out + strength * optimized_attention(q, tokens[0], tokens[1], options["n_heads"])

    clone = model.clone()
    for name, number, _ in transformer_layers(model.model.diffusion_model):
        clone.set_model_attn2_replace(patch, name, number)
    return clone


def test_it_works_around_a_patch_that_is_there_and_one_that_comes_later(clip):
    from likeness.core.attention.prompt_to_prompt import Swap

    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    adapted = adapter(setting.model)
    alone = play(adapted, positive, negative, latent)
    before = play(swapped(setting, clip, model=adapted)[0], positive, negative, latent)
    assert torch.equal(before, play(adapter(model), positive, negative, latent))
    assert torch.equal(before[0], alone[0]) and float((before[1] - alone[1]).abs().mean()) > 1e-3
    assert float((before - play(model, positive, negative, latent)).abs().mean()) > 1e-3
    setting.model = adapted
    assert torch.equal(alone, play(controlled_by(setting, positive, Swap(0, 77, 77)), positive, negative, latent))


@pytest.mark.parametrize("self_percent", [0.0, 1.0])
def test_perturbed_attention_keeps_its_effect(clip, self_percent):
    """PAG patches the middle block's self-attention for calls of its own, in which ours must not take its place."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model, *rest = swapped(setting_of(), clip, self_percent=self_percent)
    weak, strong = (
        play(run_node(PerturbedAttentionGuidance, model=model, scale=scale)[0], *rest) for scale in (0.0, 3.0)
    )
    assert float((strong - weak).abs().mean()) > 1e-3


def test_patches_that_change_what_comes_together_are_refused(clip):
    setting = setting_of()
    model, *rest = swapped(setting, clip)
    wider, split = model.clone(), model.clone()
    wider.set_model_attn2_patch(lambda n, c, v, _options: (n, *(torch.cat([each, each[:, :4]], 1) for each in (c, v))))
    with pytest.raises(ValueError, match="has 77 rows, 81 came"):
        play(wider, *rest)
    repeated = model.clone()
    repeated.set_model_attn2_patch(lambda n, c, v, _options: (n, *(torch.cat([each, each], 1) for each in (c, v))))
    with pytest.raises(ValueError, match="has 77 rows, 154 came"):
        play(repeated, *rest)
    split.set_model_attn2_patch(lambda *parts: tuple(torch.cat([each, each]) for each in parts[:3]))
    with pytest.raises(ValueError, match="8 rows came for 2 prompts"):
        play(split, *rest)


def test_the_base_model_is_as_it_was(clip):
    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    before, options = play(setting.model, positive, negative, latent), repr(setting.model.model_options)
    play(model, positive, negative, latent)
    assert torch.equal(before, play(setting.model, positive, negative, latent))
    assert repr(setting.model.model_options) == options and not setting.model.wrappers
    assert not model.model_options["transformer_options"].get("patches_replace")
    again = swapped(setting, clip, model=model)[0]
    assert [len(keyed) for keyed in again.wrappers["sampler_sample"].values()] == [1]


def subject(steps: int = 1, width: int = 768, **header):
    from likeness.core.embedding.artifact import Embedding

    rows = torch.randn(steps, 5, width, generator=torch.Generator().manual_seed(7))
    edges = [index / steps for index in range(steps + 1)]
    windows = list(zip(edges[:-1], edges[1:], strict=True))
    return Embedding({3: rows}, {**header, "windows": windows} if steps > 1 else header)


def test_a_learned_subject_goes_into_the_edit_alone_with_its_own_attention(clip):
    setting, learned = setting_of(), subject()
    plain = swapped(setting, clip)[1][0][0]
    model, positive, negative, latent = swapped(setting, clip, embedding=learned, scale=0.8)
    rows = positive[0][0]
    assert torch.equal(rows[0], plain[0]) and torch.equal(rows[1, :-5], plain[1, :-5])
    assert torch.equal(rows[1, -5:], 0.8 * learned.rows[3][0])
    close(
        play(model, positive, negative, latent),
        play(by_hand(setting, [5, *range(72, 77)]), *(positive, negative), latent),
    )
    off = swapped(setting, clip, embedding=learned, scale=0.0)
    assert torch.equal(off[1][0][0], plain) and torch.equal(play(*off), play(*swapped(setting, clip)))


def test_a_step_wise_subject_has_an_entry_for_each_window(clip):
    setting, learned = setting_of(), subject(4)
    model, positive, negative, latent = swapped(setting, clip, embedding=learned)
    windows = [(options["start_percent"], options["end_percent"]) for _, options in positive]
    assert windows == learned.windows
    assert all(torch.equal(e[0][1, -5:], learned.rows[3][i]) for i, e in enumerate(positive))
    assert all(torch.equal(e[0][0], positive[0][0][0]) for e in positive)
    close(
        play(model, positive, negative, latent),
        play(by_hand(setting, [5, *range(72, 77)]), *(positive, negative), latent),
    )


def test_what_lies_on_the_inverted_prompt_holds_for_both_pictures():
    """SDXL's sizes: the reconstruction is that prompt's own image, and the edit moves too."""
    setting, clip = setting_of("sdxl"), text_encoder("sdxl")
    ((rows, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    source = [[rows, {**options, "width": 4096, "height": 256, "crop_w": 512}]]
    model, positive, negative, latent = swapped(setting, clip, positive=source)
    found, without = play(model, positive, negative, latent), play(*swapped(setting, clip))
    alone = play(setting.model, source, negative, {"samples": latent["samples"][:1]})
    close(found[:1], alone)
    assert all(float((one - other).abs().mean()) > 1e-3 for one, other in zip(found, without, strict=True))
    other = clip.encode_from_tokens_scheduled(clip.tokenize("a painting of a house"))
    with pytest.raises(ValueError, match="The positive prompt is not 'a photo"):
        swapped(setting, clip, positive=other)


def test_what_cannot_be_replaced_is_refused_before_sampling(clip):
    setting = setting_of()

    def refused(match: str, **changes):
        with pytest.raises(ValueError, match=match):
            swapped(setting, **{"clip": clip, **changes})

    refused("'dog' is not in the prompt", word="dog")
    refused("'cats' is not in the prompt", word="cats")
    refused(rf"'{'x' * 57}\.\.\.' is not in the prompt", word="x" * 100_000)
    refused("'a' is 2 times in the prompt", word="a")
    refused("write one or more words", word=" ")
    refused("write one or more words", replacement="")
    refused("has 81 tokens, 75 fit.*shorten it by 6", prompt="a cat " + 79 * "x ")
    refused("has 76 tokens, 75 fit.*by 1", prompt="a cat " + 73 * "x ", replacement="big dog")
    refused("leaves only 2 unused: shorten the prompt by 3", prompt="a cat " + 71 * "x ", embedding=subject())
    refused("no token sequence of its own", prompt="a photo of a (cat:1.2)", word="(cat")
    refused("holds 2 images", latent={"samples": torch.ones(2, 4, 8, 8)})
    refused("connect the model", embedding=subject(base={"family": "SDXL"}))
    refused("width 1024", embedding=subject(width=1024))
    refused("expected a CLIP.*Load CLIP", clip=None)
    for prompt, word in (("a photo of a (cat:1.2), on the grass", "cat"), ("A photo of a Black Cat.", "black cat")):
        swapped(setting, clip, prompt=prompt, word=word)


def test_a_longer_negative_repeats_the_rows_and_changes_nothing_else(clip):
    """ComfyUI pads prompts that come in one call to the same length."""
    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    longer = [[negative[0][0].repeat(1, 2, 1), negative[0][1]]]
    close(play(model, positive, longer, latent), play(model, positive, negative, latent))


def test_what_does_not_belong_together_is_refused_when_sampling_starts(clip):
    from nodes import ConditioningConcat

    setting = setting_of()
    model, positive, negative, latent = swapped(setting, clip)
    with pytest.raises(ValueError, match=r"holds 1 image\(s\).*works on two"):
        play(model, positive, negative, {"samples": latent["samples"][:1]})
    with pytest.raises(ValueError, match="not from Replace Subject"):
        play(model, setting.target, negative, latent)
    with torch.inference_mode():
        joined = ConditioningConcat().concat(positive, [[positive[0][0].flip(1), {}]])[0]
    with pytest.raises(ValueError, match=r"has 77 rows, 154 came.*Conditioning Concat"):
        play(model, joined, negative, latent)
    with pytest.raises(ValueError, match="another Replace Subject's"):
        play(model, swapped(setting, clip, replacement="car")[1], negative, latent)


def test_no_embedding_is_passed_on_as_nothing_to_save(clip):
    """What would save it is skipped, and fails nothing else."""
    from comfy_execution.graph_utils import ExecutionBlocker

    assert isinstance(outputs(setting_of(), clip)[4], ExecutionBlocker)
