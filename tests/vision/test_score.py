"""The two nodes as ComfyUI calls them: what is measured, what is ranked, and what is refused."""

from __future__ import annotations

import math

import folder_paths
import pytest
import torch
from comfy_api.latest import io

from likeness.core.session import folders, progress
from likeness.core.vision.host import scoring
from likeness.core.vision.host.vision import load_vision
from likeness.nodes.score import LikenessLoadVision, LikenessScore

from .models import clip_folder, core_vision, dino_folder, pictures
from .test_lpips_files import write

OUTPUTS = ["dino", "clip_i", "clip_t", "psnr", "lpips", "report", "best", "order", "picture"]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    clip_folder(folder / "clip")
    dino_folder(folder / "dino")
    return {name: load_vision(folder / name) for name in ("clip", "dino")}


def run(**inputs) -> dict:
    """Outputs of the node by id, as ComfyUI runs it: everything is an inference tensor."""
    with torch.inference_mode():
        inputs = {name: v.clone() if torch.is_tensor(v) else v for name, v in inputs.items()}
        result = LikenessScore.execute(**inputs)
    return {**dict(zip(OUTPUTS, result.args, strict=True)), "ui": result.ui}


def masks(count: int, side: int = 40, left: int = 10) -> torch.Tensor:
    mask = torch.zeros(count, side, side)
    mask[:, 10:30, left : left + 20] = 1.0
    return mask


def test_equal_pictures_score_highest(vision):
    reference = pictures(1)
    images = torch.cat([pictures(1, seed=5), reference, reference * 0.5])
    result = run(images=images, reference=reference, **vision)
    assert result["best"] == 1 and result["order"].startswith("1, ")
    assert result["dino"] == pytest.approx(1.0, abs=1e-5) and result["clip_i"] == pytest.approx(1.0, abs=1e-5)
    assert result["psnr"] == 100.0
    assert result["clip_t"] == result["lpips"] == scoring.NOT_MEASURED
    assert "not measured: CLIP-T, LPIPS" in result["report"]
    assert "Dinov2Model" in result["report"] and "CLIPModel" in result["report"]


def test_values_do_not_depend_on_the_rest_of_the_batch(vision):
    reference, images = pictures(1), pictures(3, seed=4)
    together = run(images=images, reference=reference, prompt="a red cat", **vision)
    best = together["best"]
    alone = run(images=images[best : best + 1], reference=reference, prompt="a red cat", **vision)
    for name in ("dino", "clip_i", "clip_t", "psnr"):
        assert together[name] == pytest.approx(alone[name], abs=1e-5), name


def test_identity_with_masks_ignores_the_background(vision):
    subject, mask = pictures(1, seed=1), masks(1)[..., None]
    same = subject * mask + pictures(1, seed=2) * (1 - mask)
    images = torch.cat([same, pictures(1, seed=3)])
    result = run(images=images, reference=subject, mask=masks(2), reference_mask=masks(1), dino=vision["dino"])
    assert result["best"] == 0 and result["dino"] == pytest.approx(1.0, abs=1e-5)
    assert "subject crops on white" in result["report"]
    whole = run(images=same, reference=subject, dino=vision["dino"])
    assert whole["dino"] < 0.999 and "whole images" in whole["report"]


def test_the_moved_subject_is_still_the_same(vision):
    images, reference = torch.zeros(1, 40, 40, 3), torch.zeros(1, 40, 40, 3)
    patch = pictures(1, 20, 20, seed=1)
    images[:, 10:30, 0:20], reference[:, 10:30, 20:40] = patch, patch
    inputs = {"images": images, "reference": reference, "mask": masks(1, left=0), "reference_mask": masks(1, left=20)}
    assert run(**inputs, dino=vision["dino"])["dino"] == pytest.approx(1.0, abs=1e-4)


def test_the_whole_subject_crop_is_seen_up_to_its_border(vision):
    reference = pictures(1, 200, 200) * 0.5
    images, mask = reference.clone(), torch.zeros(1, 200, 200)
    mask[:, 50:150, 50:150] = 1.0
    images[:, 50:150, 50:150] = 1.0  # an edge of 3 pixels, which a model that cuts out the centre would not see
    images[:, 53:147, 53:147] = reference[:, 53:147, 53:147]
    inputs = {"reference": reference, "mask": mask, "reference_mask": mask, "dino": vision["dino"]}
    assert run(images=reference, **inputs)["dino"] - run(images=images, **inputs)["dino"] > 1e-3


def test_psnr_outside_ignores_both_subjects(vision):
    reference = pictures(1) * 0.8
    images = reference + 0.1
    images[:, 10:30, 10:30] = 0.0
    assert run(images=images, reference=reference, mask=masks(1))["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert run(images=images, reference=reference)["psnr"] < 19.0
    soft = masks(1)
    soft[:, 10:12] = 0.3  # the edit reaches into a soft edge
    assert run(images=images, reference=reference, mask=soft)["psnr"] == pytest.approx(20.0, abs=1e-3)
    small = torch.nn.functional.avg_pool2d(masks(1)[:, None], 2)[:, 0]  # another size
    assert run(images=images, reference=reference, mask=small)["psnr"] == pytest.approx(20.0, abs=1e-3)


def test_text_score_is_the_cosine_of_both_embeddings(vision):
    images, clip = pictures(2), vision["clip"]
    result = run(images=images, prompt="a red cat", clip=clip, rank_by="clip_t")
    expected = torch.cosine_similarity(clip.encode_image(images).image_embeds, clip.encode_text(["a red cat"]))
    assert result["clip_t"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert result["best"] == int(expected.argmax()) and result["dino"] == scoring.NOT_MEASURED


def test_overall_weighs_identity_and_text_alike():
    values = {"dino": [0.5, 0.6], "clip_i": [0.6, 0.7], "clip_t": [0.35, 0.2], "psnr": [10.0, 90.0]}
    assert scoring.ranking(values, "overall")[0] == pytest.approx([0.9, 0.85])
    assert scoring.ranking(values, "identity")[0] == pytest.approx([0.55, 0.65])
    assert scoring.ranking({"psnr": [10.0, 90.0]}, "overall") == ([10.0, 90.0], "PSNR")
    assert scoring.ranking({"clip_t": [0.3]}, "overall") == ([0.3], "CLIP-T")


def test_overall_is_mean_identity_plus_text(vision):
    images, reference = pictures(4, seed=7), pictures(1)
    request = scoring.Request(images, reference, prompt="a red cat", **vision)
    scores = scoring.score(request)
    v = scores.values
    total = [(d + i) / 2 + t for d, i, t in zip(v["dino"], v["clip_i"], v["clip_t"], strict=True)]
    assert scores.order == sorted(range(4), key=lambda i: -total[i])
    assert "the mean of DINO and CLIP-I, plus CLIP-T" in scores.report()


@pytest.mark.parametrize("rank_by", ["dino", "clip_i", "clip_t", "psnr", "lpips"])
def test_ranking_by_one_measure(vision, rank_by, tmp_path):
    heads = write(tmp_path, "alexnet", ".pth")
    pack = {"folder_paths": ([str(tmp_path)], set())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, folders.LPIPS.folder, pack["folder_paths"])
        request = scoring.Request(
            pictures(4, seed=9), pictures(1), prompt="a cat", lpips=heads, rank_by=rank_by, **vision
        )
        scores = scoring.score(request)
    sign = -1 if rank_by == "lpips" else 1
    assert scores.order == sorted(range(4), key=lambda i: -sign * scores.values[rank_by][i])


def test_equal_images_keep_their_order():
    one, other = pictures(1, seed=1), pictures(1, seed=2)
    assert scoring.score(scoring.Request(torch.cat([one, other, one, other]), other)).order == [1, 3, 0, 2]


def test_lpips_outside_does_not_see_the_subject(tmp_path, monkeypatch):
    write(tmp_path, "alexnet", ".pth")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.LPIPS.folder, ([str(tmp_path)], set()))
    reference = pictures(1, 96, 96, seed=1)
    images = reference.clone()
    images[:, 24:72, 24:72] = 1.0 - images[:, 24:72, 24:72]
    mask = torch.zeros(1, 96, 96)
    mask[:, 24:72, 24:72] = 1.0
    inputs = {"images": images, "reference": reference, "lpips": "alex.pth"}
    assert run(**inputs, mask=mask)["lpips"] == 0.0
    whole = run(**inputs)
    assert whole["lpips"] > 0.01 and "LPIPS AlexNet (heads alex.pth, backbone alexnet-1234.pth)" in whole["report"]


def test_the_sheet_shows_the_pictures_with_text_below(vision):
    images = pictures(3, 64, 48)
    result = run(images=images, reference=images[:1], dino=vision["dino"])
    sheet = result["picture"]
    assert sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    assert float(sheet.min()) >= 0.0 and float(sheet.max()) <= 1.0
    assert sheet.shape[1] > 192 and sheet.shape[2] > 3 * 144
    assert float((sheet[0, 8 + 192 + 8 :] > 0.8).float().mean()) > 0.005, "no text under the images"
    shown = result["ui"]
    assert shown["text"][0] == result["report"] and len(shown["images"]) == 1


@pytest.mark.parametrize("count", [1, 2, 13])
def test_any_batch_size(count, vision):
    result = run(images=pictures(count), reference=pictures(1), dino=vision["dino"])
    assert sorted(map(int, result["order"].split(", "))) == list(range(count))
    assert result["picture"].shape[1] < 2 * (300 if count < 7 else 1000)


def test_comfyuis_own_clip_vision_works_too(tmp_path):
    own = core_vision(tmp_path, dino=False)
    result = run(images=pictures(2), reference=pictures(1), clip=own)
    assert result["best"] == 0 and result["clip_i"] == pytest.approx(1.0, abs=1e-5)
    assert "from CLIP_VISION" in result["report"]


def test_other_sizes_of_reference_still_give_identity(vision):
    result = run(images=pictures(1), reference=pictures(1, 60, 80), dino=vision["dino"])
    assert result["psnr"] == scoring.NOT_MEASURED and -1 < result["dino"] < 1
    assert "reference of the same size" in result["report"]


def test_rgba_and_fp16_pictures_are_taken(vision):
    images = torch.cat([pictures(1), torch.ones(1, 40, 40, 1)], -1).half()
    result = run(images=images, reference=pictures(1), dino=vision["dino"])
    assert result["dino"] > 0.999


def test_all_references_are_the_mean_over_all_pairs(vision):
    """As HiFi Tuner's DINO and CLIP-I: every image with every photo of the subject."""
    images, reference = pictures(2, seed=4), pictures(3, 60, 80, seed=1)
    result = run(images=images, reference=reference, all_references=True, **vision)
    means = {}
    for name, model in (("dino", vision["dino"]), ("clip_i", vision["clip"])):
        a, b = (torch.nn.functional.normalize(model.encode_image(each).image_embeds) for each in (images, reference))
        pairs = a @ b.T
        assert result[name] == pytest.approx(float(pairs.mean(1)[result["best"]]), abs=1e-5)
        means[name] = float(pairs.mean())
    said = f"mean over all 2 x 3 pairs: DINO {means['dino']:.4f}, CLIP-I {means['clip_i']:.4f}"
    assert said in result["report"] and "need one reference for each image" in result["report"]
    for one in (pictures(1, seed=1), pictures(2, seed=1)):
        usual = run(images=images, reference=one, dino=vision["dino"])
        assert (
            usual["dino"] == run(images=images, reference=one, dino=vision["dino"], all_references=True)["dino"]
        ) == (len(one) == 1)


REFUSED = {
    "nothing": ({}, "nothing to measure"),
    "dino alone": ({"dino": "dino"}, "without a reference"),
    "clip alone": ({"clip": "clip"}, "without anything to compare with"),
    "prompt alone": ({"prompt": "a cat"}, "without a clip model"),
    "reference mask alone": ({"reference_mask": masks(1), "clip": "clip", "prompt": "a"}, "without a reference"),
    "no text tower": ({"prompt": "a cat", "clip": "dino"}, "vision model only"),
    "mask batch": ({"reference": 1, "mask": masks(3)}, "3 masks were given for 2 images"),
    "reference batch": ({"reference": 3}, "3 reference images were given for 2 images"),
    "reference mask batch": ({"reference": 1, "reference_mask": masks(2)}, "2 reference masks were given"),
    "empty mask": ({"reference": 1, "mask": masks(2) * 0}, "mask 0 is empty"),
    "empty reference mask": ({"reference": 1, "reference_mask": masks(1) * 0.3}, "reference_mask 0 is empty"),
    "mask of another proportion": ({"reference": 1, "mask": masks(1)[:, :20]}, "another proportion: connect the mask"),
    "full mask": ({"reference": 1, "mask": masks(2) * 0 + 1}, "nothing lies outside"),
    "rank by unmeasured": ({"reference": 1, "rank_by": "dino"}, "choose one of overall, psnr"),
    "lpips without reference": ({"lpips": "alex.pth", "clip": "clip", "prompt": "a"}, "LPIPS was chosen without"),
    "lpips of another size": ({"lpips": "alex.pth", "reference": pictures(1, 60, 80)}, "LPIPS needs one size"),
    "lpips of several": (
        {"lpips": "alex.pth", "reference": 3, "all_references": True},
        "LPIPS was chosen with 3 refer",
    ),
    "NaN": ({"images": pictures(1) * math.nan, "reference": 1}, "'images' holds NaN"),
    "grey": ({"images": pictures(1)[..., :1], "reference": 1}, "expected .batch, height, width, 3."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_a_sentence(case, vision, tmp_path, monkeypatch):
    write(tmp_path, "alexnet", ".pth")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.LPIPS.folder, ([str(tmp_path)], set()))
    for name in ("embed", "load_lpips"):
        monkeypatch.setattr(scoring, name, lambda *_a, **_k: pytest.fail("work began before the check"))
    given, message = REFUSED[case]
    inputs = {"images": pictures(2), **given}
    inputs |= {name: vision[inputs[name]] for name in ("dino", "clip") if name in inputs}
    if isinstance(inputs.get("reference"), int):
        inputs["reference"] = pictures(inputs["reference"])
    with pytest.raises(ValueError, match=message) as caught:
        run(**inputs)
    assert ":" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../alex.pth", "/etc/passwd", "alexnet-1234.bin"])
def test_hostile_lpips_names_are_refused(name, tmp_path, monkeypatch):
    (tmp_path / "alexnet-1234.bin").write_bytes(b"x")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.LPIPS.folder, ([str(tmp_path)], set()))
    with pytest.raises(ValueError, match="likeness_lpips"):
        run(images=pictures(1), reference=pictures(1), lpips=name)


def test_load_node_lists_loads_and_notices_changes(tmp_path, monkeypatch):
    dino_folder(tmp_path / "dino")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.VISION.folder, ([str(tmp_path)], set()))
    schema = LikenessLoadVision.define_schema()
    assert schema.inputs[0].options == ["dino"]
    before = LikenessLoadVision.fingerprint_inputs(name="dino")
    with torch.inference_mode():
        loaded = LikenessLoadVision.execute("dino").args[0]
        assert loaded.encode_image(pictures(1)).image_embeds.shape == (1, 24)
    dino_folder(tmp_path / "dino", seed=1)
    (tmp_path / "dino" / "extra").write_text("x")
    assert LikenessLoadVision.fingerprint_inputs(name="dino") != before


def test_every_input_and_output_is_explained():
    for node in (LikenessLoadVision, LikenessScore):
        schema = node.define_schema()
        assert schema.node_id.startswith("Likeness") and schema.category.startswith("likeness/")
        assert all(part.tooltip for part in (*schema.inputs, *schema.outputs))
    assert [output.display_name for output in LikenessScore.define_schema().outputs] == OUTPUTS


def test_named_images_are_shown_the_best_first(vision):
    images, side = pictures(3), masks(1).shape[-1]
    inputs = {"images": images, "reference": images[1:2], "dino": vision["dino"]}
    plain, named = run(**inputs), run(**inputs, names="text alone, HiPer,SINE")
    assert (named["best"], named["order"], plain["best"]) == (1, plain["order"], 1)
    rows = [line.split("  ")[0].strip() or line.split()[0] for line in named["report"].splitlines()[1:4]]
    order = [int(index) for index in plain["order"].split(",")]
    assert [row.split()[0] for row in rows] == [["text", "HiPer", "SINE"][index] for index in order]
    assert "order: HiPer, " in named["report"] and named["report"].splitlines()[1].endswith("best")
    assert not torch.equal(named["picture"][:, :side], plain["picture"][:, :side])
    with pytest.raises(ValueError, match="2 names were given for 3 images: give one for each, separated by commas"):
        run(**inputs, names="a, b")


def node(title: str, *ahead: str) -> dict:
    return {"class_type": "", "inputs": {f"in_{each}": [each, 0] for each in ahead}, "_meta": {"title": title}}


def test_seconds_of_a_method_are_those_of_its_trainings_in_front(vision, monkeypatch):
    prompt = {
        "1:1": node("HiFi Tuner: learn"),
        "1:2": node("HiFi Tuner: refine", "1:1"),
        "1:3": node("SINE: learn"),
        "1:4": node("HiPer: learn"),
        "1:5": node("HiPer 2: learn"),
        "1:6": node("Scores", "1:2", "1:3", "1:4"),
        "2": node("HiPer: learn"),
    }
    learned = {"1:1": 20.0, "1:2": 2.5, "1:3": None, "1:4": 7.0, "1:5": 100.0, "2": 100.0}
    monkeypatch.setattr(progress, "_learned", learned)
    names = ("HiFi Tuner", "SINE", "HiPer", "text alone")
    assert [progress.seconds_of(name, "1:6", prompt) for name in names] == [22.5, None, 7.0, None]
    monkeypatch.setattr(LikenessScore, "hidden", io.HiddenHolder("1:6", prompt, None, None, "", ""), raising=False)
    report = run(images=pictures(4), reference=pictures(1), **vision, names=", ".join(names))["report"]
    assert [line for line in report.splitlines() if "learned" in line] == [
        "HiFi Tuner: learned in 22.5 s",
        "HiPer: learned in 7.0 s",
    ]
    for other in (None, "", [], {"title": None}, {"title": 5}):  # whatever a graph says
        prompt["1:4"]["_meta"] = other
        assert progress.seconds_of("HiPer", "1:6", prompt) is None
