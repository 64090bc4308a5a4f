"""The trainer's readers of data sets, on tiny files with known answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from likeness.core.ezigen.subject_pairs import Pair, PairFolder, index_of, pair_generator
from likeness.toolbox.adapter_trainer.coco import Coco
from likeness.toolbox.adapter_trainer.data import PairDataset, Share, source
from likeness.toolbox.adapter_trainer.masks import largest_part, run_lengths, unpack
from likeness.toolbox.adapter_trainer.youtube_vis import SENTENCES, YoutubeVis, around, widen

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
SIZE = 32
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
# What COCO's own tools make of with_hole().
WITH_HOLE = (
    "01iU1W1kjN000000000000000000ROF::FF::FF::FF::FF::FF::FF::FF::FF::FF::d0000000000000000000000000000000000000000"
    "0000000000000000000VU1"
)


def with_hole() -> numpy.ndarray:
    mask = numpy.zeros((60, 90), dtype=bool)
    mask[10:50, 20:70] = True
    mask[20:30, 30:40] = False
    mask[0, 0] = True
    return mask


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(segmentation: object, height: int, width: int) -> numpy.ndarray:
    runs = run_lengths(segmentation, height, width)
    assert runs is not None
    return unpack(runs, Image.new("RGB", (width, height)))


def test_run_lengths():
    mask = with_hole()
    counts = tiny.column_runs(mask)
    for form in (WITH_HOLE, counts):
        assert (mask_of({"counts": form, "size": [60, 90]}, 60, 90) == mask).all()
    for form, size in ((WITH_HOLE, [60, 91]), (counts, [60, 91]), (counts[:-1], [60, 90]), (WITH_HOLE[:-9], [60, 90])):
        with pytest.raises(ValueError, match=r"damaged mask|Invalid RLE"):
            mask_of({"counts": form, "size": size}, *size)
    with pytest.raises(ValueError, match="another image: 90 x 60 pixels"):
        mask_of({"counts": counts, "size": [60, 90]}, 60, 91)
    with pytest.raises(ValueError, match="an empty"):
        mask_of({"counts": [5400], "size": [60, 90]}, 60, 90)


def test_polygons():
    mask = mask_of([[2, 3, 8, 3, 8, 7, 2, 7], [10, 1, 12, 1, 12, 2, 10, 2]], 10, 14)
    expected = numpy.zeros((10, 14), dtype=bool)
    expected[3:7, 2:8] = True
    expected[1, 10:12] = True
    assert (mask == expected).all()
    assert largest_part(mask) == pytest.approx(24 / 26)
    for damaged in ([[1, 1, 5, 5]], [[1, 1, 5, 1, 5, 5], [1, 1]], [], {"counts": [70, -1, 71], "size": [10, 14]}, "x"):
        assert run_lengths(damaged, 10, 14) is None


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


DOG, BALL = (20, 10, 60, 50), (70, 30, 110, 60)  # 1600 and 1200 pixels
INSTANCES = {
    1: [(37, 1200, rectangle(*BALL)), (18, 1600, rectangle(*DOG)), (18, 400, rectangle(0, 0, 20, 20)),
        (18, 5000, {"counts": [0, 5000, 4600], "size": [80, 120]})],
    2: [(18, 1000 + number, rectangle(*DOG)) for number in range(5)],
    3: [(18, 1600, rectangle(*DOG))],
    4: [(18, 999, rectangle(*DOG))],
    5: [(18, 1600, rectangle(*DOG))],
    6: [(18, 1700, [[1, 1, 5, 5]]), (37, 1200, rectangle(*BALL))],
}  # fmt: skip
CAPTIONS = {1: ["a dog", " a dog and its\nred ball ", "dogs"], 2: ["many dogs"], 4: ["small"], 5: ["lost"], 6: ["x"]}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    (folder / "train2014").mkdir()
    (folder / "annotations").mkdir()
    picture = Image.new("RGB", (120, 80), GREEN)
    picture.paste(BLUE, DOG)
    picture.paste(RED, BALL)
    for number in INSTANCES:
        picture.save(folder / "train2014" / f"{number}.png")
    (folder / "train2014" / "5.png").write_bytes(b"not an image")
    instances = [
        {"id": 0, "image_id": number, "category_id": category, "area": area, "segmentation": segmentation}
        for number, found in INSTANCES.items()
        for category, area, segmentation in found
    ]
    written = {
        "images": [{"id": number, "file_name": f"{number}.png", "height": 80, "width": 120} for number in INSTANCES],
        "categories": [{"id": 18, "name": "dog"}, {"id": 37, "name": "sports ball"}],
        "annotations": instances,
    }
    captions = [{"id": 0, "image_id": number, "caption": text} for number in CAPTIONS for text in CAPTIONS[number]]
    (folder / "annotations" / "instances_train2014.json").write_text(json.dumps(written))
    (folder / "annotations" / "captions_train2014.json").write_text(json.dumps({"annotations": captions}))
    return folder


def colour(value: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(value)[:, None, None] / 255


def test_coco_pairs(coco):
    """Largest first, none below 1000 pixels, no crowd, the longest caption; stretched, cropped, squared on white."""
    found = Coco(coco, SIZE)
    assert [record.path.name for record in found.records] == ["1.png", "2.png", "5.png", "6.png"]
    assert found.left_out == 2
    pair = found.pair(0, dice())
    assert (pair.caption, pair.classes) == ("a dog and its red ball", ["dog", "sports ball"])
    assert pair.target.shape == (3, SIZE, SIZE) and pair.subjects.shape == (2, 3, SIZE, SIZE)
    # The dog is a third of the image wide and half as high: 21 of 32 pixels wide on white.
    dog = pair.subjects[0]
    assert (dog[:, :, 6:25] == colour(BLUE)).all()
    assert (dog[:, :, [*range(5), *range(27, SIZE)]] == 1).all()
    assert (pair.target[:, 6:18, 7:14] == colour(BLUE)).all()
    assert (pair.target[:, :, 0] == colour(GREEN)[..., 0]).all()


def test_coco_takes_the_larger_half_of_many(coco):
    assert [len(record.instances) for record in Coco(coco, SIZE).records] == [2, 2, 1, 1]
    assert len(Coco(coco, SIZE, max_subjects=1).pair(0, dice()).classes) == 1
    assert len(Coco(coco, SIZE, limit=1)) == 1


def test_coco_skips_and_counts_what_is_dead(coco):
    found = Coco(coco, SIZE)
    pair = found.pair(2, dice())  # image 5 is no image, and the larger instance of image 6 has no outline
    assert (pair.caption, pair.classes) == ("x", ["sports ball"])
    assert len(found.skipped) == 1 and found.skipped[0].startswith("5.png")
    assert found.damaged == 1


def test_damaged_masks_are_left_out_and_counted(coco, tmp_path):
    """One among half a million ends nothing."""
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    file = folder / "annotations" / "instances_train2014.json"
    written = json.loads(file.read_text())
    damaged = [[["x", 1, 2, 3, 4, 5]], [[1, 2], [3, [4]]]]
    written["annotations"] += [
        {"id": 0, "image_id": 4, "category_id": 18, "area": 5000, "segmentation": each} for each in damaged
    ]
    file.write_text(json.dumps(written))
    found = Coco(folder, SIZE)
    assert found.damaged == 3 and "3 damaged masks" in found.describe()
    assert [record.path.name for record in found.records] == [each.path.name for each in Coco(coco, SIZE).records]


def test_coco_without_captions(coco, tmp_path):
    (tmp_path / "annotations").mkdir()
    instances = (coco / "annotations" / "instances_train2014.json").read_bytes()
    (tmp_path / "annotations" / "instances_train2014.json").write_bytes(instances)
    with pytest.raises(ValueError, match="no captions of train2014: annotations/captions_train2014.json was expected"):
        source(tmp_path, SIZE)
    (tmp_path / "annotations" / "captions_train2014.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="no images of train2014"):
        source(tmp_path, SIZE)
    (tmp_path / "train2014").mkdir()
    with pytest.raises(ValueError, match="no captioned image with a usable instance"):
        source(tmp_path, SIZE)
    (tmp_path / "annotations" / "captions_train2014.json").write_text("[{]")
    with pytest.raises(ValueError, match="captions_train2014.json is not a file of annotations"):
        source(tmp_path, SIZE)


def test_an_image_of_another_size_than_its_masks_is_skipped(coco, tmp_path):
    folder = Path(shutil.copytree(coco, tmp_path / "coco"))
    Image.new("RGB", (80, 120), GREEN).save(folder / "train2014" / "1.png")
    found = Coco(folder, SIZE)
    assert found.pair(0, dice()).caption == "many dogs"
    assert found.skipped == ["1.png: an empty or damaged mask, or one of another image: 120 x 80 pixels"]


FRAMES, SEEN, SIDE = 32, 24, 100


def moved(frame: int, width: int = 30) -> numpy.ndarray:
    mask = numpy.zeros((SIDE, SIDE), dtype=bool)
    mask[40:70, 20 + frame : 20 + frame + width] = True
    return mask


def torn(frame: int) -> numpy.ndarray:
    return moved(frame, 10) | moved(frame, 40) & ~moved(frame, 30)


def runs(mask: numpy.ndarray) -> dict:
    return {"counts": tiny.column_runs(mask), "size": [SIDE, SIDE]}


def write_videos(folder: Path, dead: bool = False) -> Path:
    """One video: an object that moves and leaves, red with the frame's number in blue; and one in two parts."""
    (folder / "JPEGImages" / "one").mkdir(parents=True)
    names = [f"one/{frame:05d}.jpg" for frame in range(FRAMES)]
    for frame, name in enumerate(names):
        pixels = numpy.full((SIDE, SIDE, 3), GREEN, dtype=numpy.uint8)
        pixels[moved(frame)] = (255, 0, 8 * frame)
        Image.fromarray(pixels).save(folder / "JPEGImages" / name, format="PNG")
    if dead:
        (folder / "JPEGImages" / names[3]).write_bytes(b"")
    boxes = [rectangle(20 + frame, 40, 50 + frame, 70) for frame in range(SEEN)]
    whole = [runs(moved(frame)) if frame % 2 else box for frame, box in enumerate(boxes)]
    parts = [runs(torn(frame)) for frame in range(FRAMES)]
    written = {
        "videos": [{"id": 7, "file_names": names, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 3, "name": "giant_panda"}, {"id": 4, "name": "snake"}],
        "annotations": [
            {"video_id": 7, "category_id": 3, "segmentations": whole + [None] * (FRAMES - SEEN)},
            {"video_id": 7, "category_id": 4, "segmentations": parts},
            {"video_id": 7, "category_id": 4, "segmentations": [parts[0]] + [None] * (FRAMES - 1)},
        ],
    }
    (folder / "train.json").write_text(json.dumps(written))
    return folder


def frame_of(picture: torch.Tensor) -> float:
    """From the blue of the object's pixels."""
    red = (picture[0] > 0.99) & (picture[1] < 0.01)
    return float(picture[2][red].median() * 255 / 8)


def test_youtube_vis_pairs(tmp_path):
    """One object, two frames of it an eighth apart, the earlier as the subject on white, the later as the target."""
    found = YoutubeVis(write_videos(tmp_path), SIZE, draws=5)
    assert len(found) == 5 and len(found.videos[0]) == 2
    gaps, widths = [], []
    for seed in range(40):
        pair = found.pair(0, dice(seed))
        assert pair.classes == ["giant panda"]  # the one in two parts breaks the rule
        assert pair.caption in {sentence.format("giant panda") for sentence in SENTENCES}
        gaps.append(round(frame_of(pair.target)) - round(frame_of(pair.subjects[0])))
        inside = (pair.subjects[0][1] < 0.5).any(0)
        widths.append(int(inside.sum()))
        assert (pair.subjects[0][:, 0] == 1).all()
        assert not (pair.subjects[0][1] > 0.01)[SIZE // 2 - 2 : SIZE // 2 + 2, SIZE // 2 - 2 : SIZE // 2 + 2].any()
    assert min(gaps) == SEEN // 8 and max(gaps) > 10
    assert set(widths) == {round(SIZE / margin) for margin in (1.1, 1.2, 1.3, 1.4)}
    assert not found.skipped
    again = found.pair(3, dice(11))
    torch.testing.assert_close(again.target, found.pair(0, dice(11)).target, rtol=0, atol=0)


def test_youtube_vis_windows():
    assert widen((20, 40, 50, 70), 2.0, (100, 80)) == (5, 25, 65, 80)
    assert around((5, 25, 65, 80), (60, 60), (100, 80)) == (5, 22, 65, 80)
    assert around((0, 30, 90, 50), (90, 90), (100, 80)) == (0, 0, 90, 80)


def test_youtube_vis_skips_and_counts_dead_frames(tmp_path):
    found = YoutubeVis(write_videos(tmp_path, dead=True), SIZE)
    pairs = [found.pair(0, dice(seed)) for seed in range(40)]
    assert len(pairs) == 40
    assert found.skipped and all(problem.startswith("one/00003.jpg") for problem in found.skipped)


def test_youtube_vis_without_its_files(tmp_path):
    (tmp_path / "train.json").write_text('{"videos": [], "categories": [], "annotations": []}')
    with pytest.raises(ValueError, match="no folder of frames"):
        source(tmp_path, SIZE)
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(ValueError, match="no object with masks in two frames"):
        source(tmp_path, SIZE)
    (tmp_path / "train.json").write_text('{"videos": [3], "categories": [], "annotations": []}')
    with pytest.raises(ValueError, match="train.json is not a file of annotations"):
        source(tmp_path, SIZE)
    (tmp_path / "train.json").write_text('{"videos": []}')
    with pytest.raises(ValueError, match="not a file of annotations .KeyError..categories"):
        source(tmp_path, SIZE)


def test_a_folder_of_subjects_is_the_third_kind(tmp_path):
    found = source(tiny.write_subjects(tmp_path / "subjects"), SIZE)
    assert isinstance(found, PairFolder)
    item = PairDataset([found], seed=3)[5]
    expected = found.pair(index_of(3, 5, len(found)), pair_generator(3, 5))
    assert (item.number, item.pair.caption, item.pair.classes) == (5, expected.caption, ["ball"])
    torch.testing.assert_close(item.pair.target / 255, expected.target, atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(ValueError, match="no folder nowhere"):
        source(tmp_path / "nowhere", SIZE)


class Numbers:
    """A set whose pairs are captioned by their index."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.skipped = name, count, []

    def __len__(self) -> int:
        return self.count

    def pair(self, index: int, generator: torch.Generator) -> Pair:
        self.skipped.append(f"{self.name} {index}")
        drawn = int(torch.randint(1000, (1,), generator=generator))
        return Pair(torch.ones(3, 1, 1), f"{self.name} {index} {drawn}", torch.ones(1, 3, 1, 1), ["x"])

    def describe(self) -> str:
        return self.name


def test_every_pass_takes_every_pair_of_every_set_once():
    samples = PairDataset([Numbers("a", 5), Numbers("b", 7)], seed=1)
    items = [samples[number] for number in range(24)]
    chosen = [item.pair.caption.rpartition(" ")[0] for item in items]
    everything = {f"a {index}" for index in range(5)} | {f"b {index}" for index in range(7)}
    assert set(chosen[:12]) == everything and set(chosen[12:]) == everything
    assert chosen[:12] != chosen[12:]
    assert [item.skipped for item in items] == [[name] for name in chosen]
    fresh = PairDataset([Numbers("a", 5), Numbers("b", 7)], seed=1)
    assert fresh[17].pair.caption == items[17].pair.caption
    assert PairDataset([Numbers("a", 5), Numbers("b", 7)], seed=2)[17].pair.caption != items[17].pair.caption


def test_processes_share_what_one_would_do():
    alone = Share(batch=12)
    assert alone.total == 12 and list(alone.numbers(3, 5)) == [list(range(36, 48)), list(range(48, 60))]
    shares = [Share(batch=2, accumulate=3, processes=2, rank=rank) for rank in range(2)]
    assert shares[0].total == 12
    together = [number for share in shares for batch in share.numbers(3, 4) for number in batch]
    assert sorted(together) == list(range(36, 48))
    assert all(len(batch) == 2 for share in shares for batch in share.numbers(3, 4))
