"""Subject Mask and Caption Image in the server, with random models as their libraries write them."""

from __future__ import annotations

from unittest import mock

import pytest

from likeness.toyworld import workflows

from .. import inprocess
from .test_training_input import refused, with_node

SAM = "random_vit_b.pth"


@pytest.fixture(scope="module", autouse=True)
def models(server):
    """A detector, a captioning model and weights of a small segment-anything in the server's folders."""
    inprocess.start()
    import segment_anything

    from ..vision import finders

    vision = server.base / "models" / "likeness_vision"
    finders.grounding_dino_folder(vision / "random_dino")
    finders.blip2_folder(vision / "random_blip2", seed=1)
    with mock.patch.dict(segment_anything.sam_model_registry, vit_b=finders.small_sam):
        finders.sam_file(server.base / "models" / "sams" / SAM)
        yield


def looking(**changes) -> dict:
    prompt = with_node({}, "picture", "LoadImage", image=workflows.PICTURE)
    inputs = {"image": ["picture", 0], "subject": "red dog", "detector": "random_dino", "sam": SAM}
    values = {"box_threshold": 0.4, "text_threshold": 0.25, "choose": "best"}
    prompt = with_node(prompt, "find", "LikenessSubjectMask", **{**inputs, **values, **changes})
    prompt = with_node(prompt, "as_image", "MaskToImage", mask=["find", 0])
    prompt = with_node(prompt, "mask", "PreviewImage", images=["as_image", 0])
    prompt = with_node(prompt, "drawn", "PreviewImage", images=["find", 1])
    return with_node(prompt, "said", "PreviewAny", source=["find", 2])


def test_models_are_offered_where_they_belong(server):
    info = server.object_info()

    def choices(node: str, entry: str) -> list[str]:
        kind, *more = info[node]["input"]["required"][entry]
        return kind if isinstance(kind, list) else more[0]["options"]

    assert choices("LikenessSubjectMask", "detector") == ["random_dino"]
    assert choices("LikenessSubjectMask", "sam") == [SAM]
    assert choices("LikenessCaption", "model") == ["random_blip2"]
    assert not {"random_dino", "random_blip2"} & set(choices("LikenessLoadVision", "name"))


def test_several_are_found_and_the_best_is_cut_out(server):
    run = server.run(looking(), timeout=900)
    said = run.outputs["said"]["text"][0]
    assert "found, taken: number 0 (best)" in said and "(vit_b)" in said and "red dog" in said
    mask, drawn = (server.images(run, node)[0] for node in ("mask", "drawn"))
    assert mask.size == drawn.size == (workflows.SIZE, workflows.SIZE)
    assert {value for _, value in mask.convert("L").getcolors()} <= {0, 255}


REFUSED = {  # newer ComfyUI refuses a name that is not on the list by itself
    "nothing above the threshold": ({"box_threshold": 1.0}, "No 'red dog' above the box_threshold of 1 was found"),
    "no word": ({"subject": "  "}, "The subject is empty: write what to look for"),
    "a detector outside of its folder": (
        {"detector": "../checkpoints"},
        "not a plain name below models/likeness_vision",
    ),
    "weights outside of their folder": ({"sam": "../../secret.pth"}, "not a plain name below models/sams"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server, case):
    changes, expected = REFUSED[case]
    said = refused(server, looking(**changes))
    assert expected in said or ("outside" in case and "Value not in list" in said)


def test_broken_weights(server):
    path = server.base / "models" / "sams" / "broken.pth"
    path.write_bytes(b"nothing that can be read")
    try:
        assert "broken.pth cannot be read as weights" in refused(server, looking(sam="broken.pth"))
    finally:
        path.unlink()


def test_caption(server):
    prompt = with_node({}, "picture", "LoadImage", image=workflows.PICTURE)
    inputs = {"image": ["picture", 0], "model": "random_blip2", "max_tokens": 8}
    prompt = with_node(prompt, "describe", "LikenessCaption", **inputs)
    prompt = with_node(prompt, "first", "PreviewAny", source=["describe", 0])
    prompt = with_node(prompt, "all", "PreviewAny", source=["describe", 1])
    run = server.run(prompt)
    assert run.outputs["first"]["text"][0] and run.outputs["first"]["text"] == run.outputs["all"]["text"]


ALIGN = {
    "an empty mask": ({"mask": ["empty", 0]}, "The mask is empty"),
    "a full mask": ({"target_mask": ["full", 0]}, "The target_mask covers the whole image"),
}


@pytest.mark.parametrize("case", ALIGN)
def test_masks_that_cannot_be_aligned(server, case):
    changes, expected = ALIGN[case]
    prompt = with_node({}, "picture", "LoadImage", image=workflows.PICTURE)
    prompt = with_node(prompt, "mask", "ToyworldSubjectMask", image=["picture", 0])
    for name, value in (("empty", 0.0), ("full", 1.0)):
        prompt = with_node(prompt, name, "SolidMask", value=value, width=workflows.SIZE, height=workflows.SIZE)
    inputs = {"image": ["picture", 0], "mask": ["mask", 0], "target_mask": ["mask", 0], **changes}
    prompt = with_node(prompt, "align", "LikenessAlign", form="symmetric", max_degrees=180.0, **inputs)
    assert expected in refused(server, with_node(prompt, "show", "PreviewImage", images=["align", 0]))


def test_reference_of_another_number_of_masks(server):
    prompt = with_node({}, "picture", "LoadImage", image=workflows.PICTURE)
    prompt = with_node(prompt, "two", "RepeatImageBatch", image=["picture", 0], amount=2)
    prompt = with_node(prompt, "mask", "ToyworldSubjectMask", image=["picture", 0])
    prompt = with_node(prompt, "vision", "LikenessLoadVision", name="small_world_measure")
    links = {"images": ["two", 0], "picture": ["picture", 0], "vision": ["vision", 0], "masks": ["mask", 0]}
    prompt = with_node(prompt, "choose", "LikenessChooseReference", **links)
    prompt = with_node(prompt, "show", "PreviewImage", images=["choose", 0])
    assert "1 masks came with 2 candidates" in refused(server, prompt)
