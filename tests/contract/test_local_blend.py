"""Replace Subject away from the word: the image itself stays, by the word's own attention or by a mask."""

from __future__ import annotations

import pytest
import torch

from .setting import SharedSetting as Setting
from .test_replace import close, play, swapped


def test_a_mask_keeps_the_picture_itself_elsewhere(clip):
    """At every step, so at the end too; one cell that the mask touches may change."""
    setting = Setting()
    mask = torch.zeros(1, 64, 64)
    mask[0, 16:40, 16:33] = 1.0
    found = play(*swapped(setting, clip, mask=mask))
    free = play(*swapped(setting, clip))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 2:5] = True
    close(found[1][:, ~inside], found[0][:, ~inside], atol=1e-3)
    assert torch.equal(found[0], free[0]) and float((found[1] - found[0])[:, inside].abs().mean()) > 1e-2
    for wrong, match in (
        (0 * mask, "mask is empty"),
        (torch.ones_like(mask), "covers the whole image"),
        (mask.expand(2, -1, -1), "2 masks"),
        (mask[:, :40], "64 x 40 pixels, its image 8 x 8, which is another proportion"),
    ):
        with pytest.raises(ValueError, match=match):
            swapped(setting, clip, mask=wrong)


def test_a_mask_that_another_node_changes_later_counts_as_it_was(clip):
    setting = Setting()
    mask = torch.zeros(1, 64, 64)
    mask[0, 16:40, 16:33] = 1.0
    made = swapped(setting, clip, mask=mask)
    before = play(*made)
    mask.fill_(1.0)
    assert torch.equal(play(*made), before)


def test_the_local_blend_keeps_the_picture_where_the_word_is_not_looked_at(clip):
    """The kept part grows with the share; 1 keeps everything that an Euler step decides, and so the whole image."""
    setting = Setting()
    free, little, much, whole = (play(*swapped(setting, clip, blend=share)) for share in (0.0, 0.2, 0.8, 1.0))
    kept = [int(((found[1] - found[0]).abs().amax(0) < 1e-3).sum()) for found in (free, little, much)]
    assert kept[0] <= kept[1] < kept[2]
    assert all(torch.equal(found[0], free[0]) for found in (little, much, whole))
    close(whole[1], whole[0], atol=1e-3)


def test_with_mask_and_blend_the_picture_changes_only_where_both_allow_it(clip):
    setting = Setting()
    mask = torch.zeros(1, 64, 64)
    mask[0, 16:40, 16:33] = 1.0
    masked, both, none = (play(*swapped(setting, clip, mask=mask, blend=share)) for share in (0.0, 0.8, 1.0))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 2:5] = True
    changed = [(found[1] - found[0]).abs().amax(0) >= 1e-3 for found in (masked, both, none)]
    assert not (changed[1] & ~inside).any() and not changed[2].any()
    assert int(changed[1].sum()) < int(changed[0].sum())


def area_of(positive):
    return [[rows, {**options, "area": (4, 4, 2, 2)}] for rows, options in positive]


def test_the_local_blend_needs_maps_of_the_whole_picture(clip):
    setting = Setting()
    model, positive, negative, latent = swapped(setting, clip, blend=0.3)
    with pytest.raises(ValueError, match="holds in an area.*a mask in place of blend"):
        play(model, area_of(positive), negative, latent)
    mask = torch.zeros(1, 64, 64)
    mask[0, 16:40, 16:33] = 1.0
    for changes in ({}, {"mask": mask}):
        model, positive, *_ = swapped(setting, clip, **changes)
        assert play(model, area_of(positive), negative, latent).isfinite().all()


def test_the_local_blend_counts_no_perturbed_pass(clip):
    """Beside a node whose additional predictions change nothing, it is as without."""
    import comfy.samplers

    setting = Setting()
    model, *rest = swapped(setting, clip, blend=0.5)

    def again(args):
        other = args["input"].flip(-1)
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], other, args["sigma"], args["model_options"])
        return args["denoised"]

    beside = model.clone()
    beside.set_model_sampler_post_cfg_function(again)
    assert torch.equal(play(beside, *rest), play(model, *rest))
