"""The scene generator: same seed, same bytes; held-out combinations stay out; words and images agree."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from likeness.toyworld import fine, judge, world
from likeness.toyworld.subjects import KINDS, for_checking, group


def test_same_seed_same_bytes() -> None:
    for seed in range(20):
        first, second = world.scene(seed), world.scene(seed)
        assert np.array_equal(first.image, second.image) and np.array_equal(first.mask, second.mask)
        assert first.caption == second.caption and first.identity == second.identity
    assert not np.array_equal(world.scene(0).image, world.scene(1).image)


def test_training_scenes_never_show_held_out_combinations() -> None:
    def combination(made: world.Scene) -> tuple[str, str, str, str]:
        return made.identity.cls, made.identity.color, made.identity.texture, made.background

    held = set(world.held_out_combinations())
    assert 120 < len(held) < 200
    assert not any(combination(world.scene(seed)) in held for seed in range(400))
    assert all(combination(world.scene(seed, from_held_out=True)) in held for seed in range(50))


def test_every_attribute_changes_the_picture_and_has_a_word() -> None:
    base = world.make_identity("dog", "red", "", "striped", "white", "vertical", "round", "yellow")
    picture, _ = world.render(base, "grass", seed=4)
    text = world.caption(base, "grass", world.ALL_WORDS)
    assert text == "a photo of a red striped dog with white vertical stripes and a yellow round emblem on the grass"
    changes = {"color": "blue", "tone": "dark", "texture": "spotted", "pattern_color": "black", "angle": "diagonal",
               "emblem_shape": "square", "emblem_color": "white"}  # fmt: skip
    for name, value in changes.items():
        other = world.make_identity(**vars(replace(base, **{name: value})))
        changed, _ = world.render(other, "grass", seed=4)
        assert np.abs(changed.astype(int) - picture).mean() > 0.5, name
        assert world.caption(other, "grass", world.ALL_WORDS) != text, name


def test_the_mask_covers_exactly_what_the_subject_paints() -> None:
    red = world.make_identity("cup", "red", "", "plain", "", "", "", "")
    first, mask = world.render(red, "studio", seed=8)
    second, _ = world.render(replace(red, color="blue"), "studio", seed=8)
    painted = np.abs(first.astype(int) - second).max(2) > 60
    assert np.array_equal(painted[mask == 255], np.ones((mask == 255).sum(), bool))
    assert not painted[mask == 0].any()


def test_an_emblem_is_never_drawn_in_the_colour_below_it() -> None:
    for seed in range(300):
        idn = world.identity(seed)
        assert not idn.emblem_color or idn.emblem_color not in (idn.color, idn.pattern_color)


def test_hard_negatives_keep_class_and_colour() -> None:
    for seed in range(20):
        members = group(seed, checking=False)
        assert len(set(members)) == 4 and not any(for_checking(idn) for idn in members[:1])
        assert len({(idn.cls, idn.color) for idn in members}) == 1
    with pytest.raises(ValueError, match="pattern"):
        world.variant(members[0], "hat", 0)


def test_the_judge_counts_what_the_world_draws() -> None:
    expected = {"class": len(world.CLASSES), "color": len(world.COLORS), "texture": len(world.TEXTURES),
                "background": len(world.BACKGROUNDS), "pattern_color": len(world.PATTERN_COLORS) + 1,
                "angle": len(world.ANGLES) + 1, "emblem_shape": len(world.EMBLEM_SHAPES) + 1,
                "emblem_color": len(world.EMBLEM_COLORS) + 1, "tone": len(world.TONES)}  # fmt: skip
    assert expected == judge.HEADS


def test_near_twins_of_harder_subjects_differ_in_one_fine_part_that_can_be_seen() -> None:
    parts = {"second emblem": ("second_shape", "second_color"), "side": ("side",), "lines": ("lines", "lines_color"),
             "accessory": ("worn", "worn_color")}  # fmt: skip
    for seed in range(40):
        base = fine.identity(seed, world.CLASSES[seed % 8])
        assert base == fine.identity(seed, world.CLASSES[seed % 8])
        plain = world.Identity(**{name: getattr(base, name) for name in world.Identity.__dataclass_fields__})
        image, mask = world.render(base, "grass", seed)
        assert not np.array_equal(image, world.render(plain, "grass", seed)[0])
        assert world.caption(base, "grass", world.ALL_WORDS) == world.caption(plain, "grass", world.ALL_WORDS)
        for change in fine.CHANGES:
            twin = fine.variant(base, change, 17 * seed)
            differing = {name for name, value in vars(base).items() if getattr(twin, name) != value}
            assert differing and differing <= set(parts[change]), (seed, change, differing)
            other, _ = world.render(twin, "grass", seed)
            changed = (np.abs(image.astype(int) - other).max(2) > 60).sum()
            assert 12 < changed < 0.15 * mask.size, (seed, change, base, twin)
    with pytest.raises(ValueError, match="must be one of"):
        fine.variant(base, "tone", 1)


@pytest.mark.parametrize("benchmark", ["subjects", "effect_ezigen"])
def test_benchmarks_take_the_same_combinations_of_harder_subjects(benchmark: str) -> None:
    cases = importlib.import_module(f"likeness.benchmarks.{benchmark}").cases
    plain, harder = cases(16), cases(16, harder=True)
    for one, other in zip(plain, harder, strict=True):
        assert isinstance(other.identity, fine.FineIdentity) and not isinstance(one.identity, fine.FineIdentity)
        held_out = ("cls", "color", "texture")
        assert [getattr(one.identity, name) for name in held_out] == [
            getattr(other.identity, name) for name in held_out
        ]
        assert one.prompt(one.target_place) == other.prompt(other.target_place) and one.seed == other.seed
    assert len({case.label for case in harder}) == 16


def test_groups_of_harder_subjects_keep_training_and_checking_apart() -> None:
    members = [idn for seed in range(12) for idn in group(seed, False, KINDS["fine"])]
    assert len(members) == 12 * 5 and not any(for_checking(idn) for idn in members)
    assert for_checking(group(3, True, KINDS["fine"])[0])
    counts = [max(column) for column in zip(*(KINDS["fine"].labels(idn) for idn in members), strict=True)]
    assert all(found < most for found, most in zip(counts[8:], fine.LABELS, strict=True))
