"""Folders of images of subjects: what makes a pair, what is left out, and that draws depend on their number alone."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from likeness.core.ezigen.subject_pairs import PairFolder, index_of, pair_generator, subject_prompt

RED, GRAY = (250, 10, 10), (90, 90, 90)


def draw(folder: Path, name: str, *, caption: str | None = "a dog on grass", mask: bool = True, left: int = 40) -> Path:
    """A red square of 16 x 16 at (8, left) on a gray image of 32 x 64."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = numpy.full((32, 64, 3), GRAY, numpy.uint8)
    pixels[8:24, left : left + 16] = RED
    path = folder / f"{name}.png"
    Image.fromarray(pixels).save(path)
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    if mask:
        white = numpy.zeros((32, 64), numpy.uint8)
        white[8:24, left : left + 16] = 255
        Image.fromarray(white).save(folder / f"{name}.mask.png")
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        draw(tmp_path / "dog_1", f"{number}", caption=f"a dog, image {number}", left=4 * number)
    draw(tmp_path / "old_cup3", "a", caption="a cup")
    draw(tmp_path / "9", "b", caption="something else")
    (tmp_path / "9" / "class.txt").write_text("teddy  bear\n")
    return tmp_path


def test_a_pair(folder):
    pairs = PairFolder(folder, 24)
    assert len(pairs) == 8 and not pairs.skipped
    found = [pairs.pair(index, generator(index)) for index in range(len(pairs))]
    assert {pair.caption for pair in found} >= {"a cup", "something else", "a dog, image 3"}
    assert {noun for pair in found for noun in pair.classes} == {"dog", "old cup", "teddy bear"}
    for pair in found:
        assert pair.target.shape == (3, 24, 24) and pair.subjects.shape == (len(pair.classes), 3, 24, 24)
        assert float(pair.target.min()) >= 0 and float(pair.target.max()) <= 1
        for picture in pair.subjects:
            assert float(picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].min()) > 0.99  # white
            torch.testing.assert_close(picture[:, 12, 12], torch.tensor(RED) / 255, atol=0.02, rtol=0)
    assert subject_prompt("dog") == "a photo of a dog."


def test_the_target_is_a_square_around_the_subject(folder):
    pairs = PairFolder(folder, 32)
    cup = next(picture for picture in pairs.targets if picture.subject == "old_cup3")
    target = pairs.read(cup, False)
    assert target is not None
    red = (target[0] > 0.6).nonzero()
    assert red.amin(0).tolist() == [8, 8] and red.amax(0).tolist() == [23, 23]  # in the middle, and not squeezed


def test_the_subjects_are_other_pictures(folder):
    """The image itself is never among them unless it is the only one; their number goes from one to the largest."""
    pairs = PairFolder(folder, 16)
    counts = set()
    for seed in range(40):
        picture, _, shown = pairs.draw(seed % 6, generator(seed), lambda each, _cut: each)
        if picture.subject == "dog_1":
            assert picture not in shown and len(set(shown)) == len(shown)
            assert {each.subject for each in shown} == {"dog_1"}
            counts.add(len(shown))
    assert counts == {1, 2, 3, 4}
    two = PairFolder(folder, 16, max_subjects=2)
    assert max(len(two.pair(1, generator(seed)).classes) for seed in range(20)) == 2
    alone = next(number for number, picture in enumerate(pairs.targets) if picture.subject == "old_cup3")
    picture, _, shown = pairs.draw(alone, generator(), lambda each, _cut: each)
    assert shown == [picture]


def test_draws_depend_on_seed_and_number_alone(folder):
    one, other = PairFolder(folder, 16), PairFolder(folder, 16)
    for number in (13, 2, 40):
        index = index_of(5, number, len(one))
        first, second = (each.pair(index, pair_generator(5, number)) for each in (one, other))
        assert first.caption == second.caption and torch.equal(first.subjects, second.subjects)
    passes = [[index_of(5, turn * 8 + place, 8) for place in range(8)] for turn in range(3)]
    assert all(sorted(order) == list(range(8)) for order in passes) and passes[0] != passes[1]
    assert passes[0] != [index_of(6, place, 8) for place in range(8)]
    assert one.state() == other.state()
    (folder / "dog_1" / "3.txt").write_text("another dog")
    assert PairFolder(folder, 16).state() != one.state()


def test_transparency_counts_as_a_mask(tmp_path):
    path = draw(tmp_path / "dog", "a", mask=False)
    pixels = numpy.array(Image.open(path).convert("RGBA"))
    pixels[..., 3] = numpy.where(pixels[..., 0] > 200, 255, 0)
    Image.fromarray(pixels).save(path)
    pair = PairFolder(tmp_path, 32).pair(0, generator())
    torch.testing.assert_close(pair.subjects[0, :, 16, 16], torch.tensor(RED) / 255, atol=0.02, rtol=0)
    assert float(pair.subjects[0, :, 0].min()) > 0.99
    assert float(pair.target[:, 2, 2].min()) > 0.99  # the image too is put on white


def test_dead_files_are_left_out_and_counted_once(folder):
    whole = PairFolder(folder, 16)
    cut_off = folder / "dog_1" / "2.png"
    cut_off.write_bytes(cut_off.read_bytes()[:90])
    (folder / "dog_1" / "4.mask.png").write_bytes(b"no image at all")
    empty = numpy.zeros((32, 64), numpy.uint8)
    Image.fromarray(empty).save(folder / "dog_1" / "5.mask.png")
    Image.fromarray(empty[:, :20]).save(folder / "9" / "b.mask.png")
    pairs = PairFolder(folder, 16)
    assert len(pairs) == len(whole)
    captions = [pairs.pair(number, generator(number)).caption for number in range(8) for _ in range(3)]
    again = PairFolder(folder, 16)
    assert captions == [again.pair(number, generator(number)).caption for number in range(8) for _ in range(3)]
    assert set(captions) == {"a cup", *(f"a dog, image {number}" for number in (0, 1, 3, 5))}
    assert len(pairs.skipped) == 4 and {line.partition(":")[0] for line in pairs.skipped} == {
        *("dog_1/2.png", "dog_1/4.png", "dog_1/5.png", "9/b.png")
    }
    assert "left out 4" in pairs.describe() and "its mask is 20 x 32, the image 64 x 32" in pairs.describe()


def test_a_folder_of_dead_files_is_refused(tmp_path):
    draw(tmp_path / "dog", "a").write_bytes(b"")
    pairs = PairFolder(tmp_path, 16)
    with pytest.raises(ValueError, match=r"no pair of images can be read.*dog/a\.png"):
        pairs.pair(0, generator())


def test_what_is_missing_is_said(tmp_path):
    cases = {
        "nothing": (lambda folder: None, "holds no images of subjects"),
        "loose": (lambda folder: draw(folder, "a"), "lie in no subject's folder"),
        "texts": (lambda folder: draw(folder / "dog", "a", caption=None), r"no captions: dog/a\.txt was expected"),
        "masks": (lambda folder: draw(folder / "dog", "a", mask=False), r"no masks: dog/a\.mask\.png was expected"),
        "noun": (lambda folder: draw(folder / "12", "a"), r"no class noun and there is no class\.txt"),
        "apart": (
            lambda folder: [draw(folder / "dog", "a", caption=None), draw(folder / "cat", "b", mask=False)],
            "no subject has both a caption and a mask",
        ),
    }
    for name, (make, message) in cases.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            PairFolder(tmp_path / name, 16)
    with pytest.raises(ValueError, match="There is no folder"):
        PairFolder(tmp_path / "absent", 16)


def test_pictures_with_a_caption_or_a_mask_alone_still_serve(tmp_path):
    draw(tmp_path / "dog", "shown", caption=None)
    draw(tmp_path / "dog", "drawn", mask=False)
    pairs = PairFolder(tmp_path, 16)
    picture, _, shown = pairs.draw(0, generator(), lambda each, _cut: each)
    assert picture.path.name == "drawn.png" and [each.path.name for each in shown] == ["shown.png"]
    assert len(pairs.skipped) == 2


def test_hostile_contents(folder, tmp_path_factory):
    """Links out of the folder, hidden files, captions that are no text, and huge ones."""
    outside = tmp_path_factory.mktemp("outside")
    draw(outside / "dog", "secret", caption="a secret")
    (folder / "linked").symlink_to(outside / "dog")
    (folder / "dog_1" / "linked.png").symlink_to(outside / "dog" / "secret.png")
    (folder / "dog_1" / "0.txt").unlink()
    (folder / "dog_1" / "0.txt").symlink_to(outside / "dog" / "secret.txt")
    (folder / "dog_1" / "1.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "dog_1" / "2.txt").write_text("x" * 20_000)
    draw(folder / ".hidden", "a", caption="hidden")
    pairs = PairFolder(folder, 16)
    assert {picture.caption for picture in pairs.targets} == {
        *("a cup", "something else"),
        *(f"a dog, image {number}" for number in (3, 4, 5)),
    }
    assert sum("leads out of the folder" in line for line in pairs.skipped) == 3
    assert any("1.txt" in line for line in pairs.skipped) and any("longer than" in line for line in pairs.skipped)
