"""The shipped graph of HiFi Tuner's ablation (Table 2 of the paper): one thing added after the other."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing
from .hifi import (
    ANCHOR_WEIGHT,
    CAPTION,
    FIRST,
    MASK_NOTE,
    MASK_ROWS,
    REFERENCE,
    REFERENCE_ROWS,
    TARGET,
    Beginning,
    Subject,
    guide,
    reference_for,
    scores,
)
from .inversion import FRESH_LEVELS
from .pieces import MODEL_NOTE, ON_NOTE, VISION_NOTE

ROWS = {
    "Base": "base",
    "+ mask": "mask",
    "+ regularisation": "regularised",
    "+ step-wise": "step_wise",
    "+ reference": "reference",
}


def ablation(draw: Drawing) -> None:
    """The five rows of the table from the same noise, with their scores."""
    make = Subject(draw)
    draw.note(
        "# What each part of HiFi Tuner adds (its Table 2)\nFive pictures from the same noise, each with one thing "
        "more than the one before: **base** (five rows from the empty prompt, no mask), **+ mask**, **+ "
        "regularisation** (held near the empty prompt), **+ step-wise** rows, **+ reference guidance**. 'Scores' has "
        "the table: identity (DINO, CLIP-I) should rise, the prompt's score (CLIP-T) should stay. One picture says "
        "little: change the noise and look again, or batch several subjects' results by hand.\n\n"
        + FIRST
        + "\n\nThree trainings of "
        "1000 steps and one of 500, once; with the picture and prompts of 'hifi_train_subject' two of them are already "
        "done.\n\n" + FRESH_LEVELS + MODEL_NOTE + REFERENCE_ROWS + MASK_ROWS + VISION_NOTE + ON_NOTE + MASK_NOTE,
        960,
    )
    model = make.model()
    vision = draw.node("LikenessLoadVision", "DINO (reference)", name=REFERENCE)
    draw.column()
    picture = make.subject()
    mask = make.mask("Mask", picture)
    text = make.text("Prompt of the new picture", TARGET)
    draw.column()
    caption = make.prompt("Source prompt", model["CLIP"], CAPTION)
    target = make.prompt("Prompt, encoded", model["CLIP"], text)
    empty = make.prompt("Empty prompt", model["CLIP"], "")
    levels = make.levels(model, noiseless=False)
    begin = Beginning(make.canvas(), make.noise())
    draw.column()
    base = make.train("Learn everything", model, picture, caption, empty)
    masked = make.train("Learn inside the mask", model, picture, caption, empty, mask=mask["mask"])
    draw.column()
    held = make.train(
        "Learn the subject", model, picture, caption, empty, mask=mask["mask"], anchor_weight=ANCHOR_WEIGHT
    )
    refined = make.refine(model, picture, mask["mask"], caption, empty, held, levels)
    draw.column()
    applied = [
        make.apply(f"{name}: prompt", target, trained["embedding"], model)
        for name, trained in zip(ROWS, (base, masked, held, refined), strict=False)
    ]
    draw.column()
    images = [
        make.fresh(f"{name}: sample", model, positive, empty, begin, levels)
        for name, positive in zip(ROWS, applied, strict=False)
    ]
    draw.column()
    reference = reference_for(make, picture, mask["mask"], images[-1], vision["vision"])
    guided = guide(make, model, applied[-1], empty, caption, reference, begin, levels)
    images.append(make.decode(guided["latent"], model))
    draw.column()
    for (title, name), image in zip(ROWS.items(), images, strict=True):
        make.save(title, image, f"hifi_ablation_{name}")
    draw.column()
    scores(make, images, picture, text, bypassed=False)


GRAPHS: dict[str, Callable[[Drawing], None]] = {"hifi_ablation": ablation}
