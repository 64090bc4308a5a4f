"""More shipped graphs of EZIGen: pictures of other models, a place in a picture, and with HiPer's rows and SINE."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing, Output
from .ezigen import (
    CLASS,
    FIND_NOTE,
    FIND_ROWS,
    FIRST,
    HOW,
    LOOPS,
    MODELS,
    NEGATIVE,
    SAMPLER,
    SCENE,
    SCHEDULER,
    SCORE_ROWS,
    SD21,
    STEPS,
    Zero,
)
from .hifi import DETECTOR, SAM
from .pieces import SEED, SIZE, score_node
from .sine import BASE_WEIGHT, END_PERCENT, TRAINED, WHOLE_STEPS
from .siso import TURBO, Base, row
from .siso_edit import Editing

SOURCE, EDIT = "a photo of a dog on a sofa", "a photo of a dog wearing a red scarf in the snow"
ROWS_SCALE, ROOM = 0.8, 8


class Place(Zero, Editing):
    """Zero, with a picture to change and its mask."""


def any_picture(draw: Drawing) -> None:
    """The layout by another model."""
    make = Zero(draw)
    draw.note(
        "# Your subject in a picture of another model (EZIGen)\nAnother model draws the scene (here SDXL-turbo; any "
        "model, any sampler, or a picture from your disk), and EZIGen's loops bring the subject into it: SD2.1-base "
        "draws the last half of the steps again, looking at your picture, six times (150 steps). So the layout is as "
        "good as the other model's, and the details are SD2.1's.\n\n"
        + FIRST
        + "The scene should show something of the subject's kind, about as large and turned as it is in your picture: "
        "the loops change what a thing looks like, less what shape it has. "
        + HOW
        + "For another model set its own steps and cfg in 'Draw the scene', and its size (1024 for SDXL) in 'Size of "
        "the results'; 'To the size of the loops' brings the picture to 512. For a picture from your disk, lead a "
        "'Load Image' to 'To the size of the loops'.\n\n"
        + MODELS
        + row(TURBO, "Stability AI non-commercial research")
        + FIND_ROWS
        + FIND_NOTE,
        960,
    )
    other = draw.node("CheckpointLoaderSimple", "Other model", models=(TURBO,), ckpt_name=TURBO["name"])
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    draw.column()
    text = make.text("Scene", SCENE)
    scene = make.prompt("Scene, for the other model", other["CLIP"], text)
    nothing = make.prompt("Negative, for the other model", other["CLIP"], "")
    canvas = make.canvas()
    drawn = make.sample(
        "Draw the scene", other["MODEL"], scene, nothing, canvas, steps=4, cfg=1.0, sampler_name="euler_ancestral"
    )
    image = make.decode(drawn, other)
    sized = draw.node(
        "ImageScale",
        "To the size of the loops",
        image=image,
        upscale_method="lanczos",
        width=SIZE,
        height=SIZE,
        crop="center",
    )["IMAGE"]
    make.save("Scene of the other model", sized, "ezigen_scene")
    draw.column()
    subject = make.subject(base)
    draw.column()
    positive = make.prompt("Scene, encoded", base.clip, text)
    empty = make.prompt("Negative of the loops", base.clip, "")
    more = {"split_ratio": 0.5, "min_loops": 2 * LOOPS, "max_loops": 2 * LOOPS}
    staged = make.staged(base, subject, adapter, latent=canvas, positive=positive, negative=empty, image=sized, **more)
    draw.column()
    make.shown(staged, "ezigen_any")


def edit(draw: Drawing) -> None:
    """The subject in a place of a picture."""
    make = Place(draw)
    draw.note(
        "# Your subject in a place of a picture (EZIGen)\nWhat is inside the painted place becomes your subject; "
        "outside of it the picture stays, as its own inverted latents are put back behind every step. Nothing is "
        "trained.\n\n**First** load the picture in 'Picture to change', right-click it, choose 'Open in MaskEditor' "
        "and paint what stands there now, all of it. It should be something of your "
        "subject's shape and size: the loops change its looks more than its outline. "
        + FIRST.replace("**First** l", "L")
        .replace("the picture you want in 'Scene'", "the same in 'What comes there'")
        .replace(", with the same word. ", ". ")
        + "The picture to change is cut to a 512 x 512 square; for another shape set the same sides in 'To the model's "
        "size' and 'Mask to the model's size' (768 x 512).\n\nToo little of the subject: raise split_ratio in 'Put it "
        "there' (the graph's picture was made with 0.6) or both loop numbers. 'paste' puts the picture's own pixels "
        "back outside of the place, to "
        "the last bit.\n\n"
        + MODELS
        + FIND_ROWS
        + FIND_NOTE
        + 'The group "Find the place" does the same for what stands there now.\n',
        1100,
    )
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    draw.column()
    change = draw.node("LoadImage", "Picture to change", image="example.png")
    image = draw.node(
        "ImageScale",
        "To the model's size",
        image=change["IMAGE"],
        upscale_method="lanczos",
        width=SIZE,
        height=SIZE,
        crop="center",
    )["IMAGE"]
    painted = make.painted(change)
    found = draw.node("LikenessSubjectMask", "What goes", image=image, subject="dog", detector=DETECTOR, sam=SAM)
    both = draw.node(
        "MaskComposite", "Painted or found", destination=painted, source=found["mask"], x=0, y=0, operation="or"
    )
    draw.group("Find the place", [found, both], bypassed=True)
    place = draw.node("GrowMask", "A little room", mask=both["MASK"], expand=ROOM)
    draw.column()
    subject = make.subject(base)
    draw.column()
    comes = make.prompt("What comes there", base.clip, CLASS)
    empty = make.prompt("Empty prompt", base.clip, "")
    edited = draw.node(
        "LikenessStagedEdit",
        "Put it there",
        model=base.model,
        vae=base.vae,
        adapter=adapter,
        subject=subject["subject"],
        positive=comes,
        negative=empty,
        image=image,
        mask=place["MASK"],
        seed=SEED,
        min_loops=LOOPS,
        max_loops=LOOPS,
    )
    draw.column()
    make.save("Edited picture", edited["image"], "ezigen_edit")
    draw.node("PreviewImage", "Picture and loops", images=edited["loops"])
    draw.node("PreviewAny", "Report", extra=120, source=edited["report"])


class Together(Zero):
    """Three methods on one checkpoint."""

    def rows(self, base: Base, picture: Output, source: Output) -> Output:
        """HiPer: the subject as rows of the prompt."""
        node = self.draw.node(
            "LikenessTrainEmbedding",
            "Learn the subject",
            extra=420,
            model=base.model,
            positive=source,
            image=picture,
            vae=base.vae,
            seed=SEED,
            preview_steps=0,
        )
        return node["embedding"]

    def tuned(self, base: Base, picture: Output, text: Output, positive: Output) -> Output:
        """SINE: the model that knows this one picture."""
        node = self.draw.node(
            "LikenessFineTune",
            "Learn the picture",
            extra=140,
            model=base.model,
            vae=base.vae,
            image=picture,
            prompt=text,
            positive=positive,
            seed=SEED,
            patches=False,
            steps=WHOLE_STEPS,
        )
        return node["model"]

    def in_stages(
        self, title: str, base: Base, model: Output, positive: Output, negative: Output, canvas: Output
    ) -> Output:
        """A stock sampling with the published steps, decoded."""
        settings = {"steps": STEPS, "sampler_name": SAMPLER, "scheduler": SCHEDULER}
        latent = self.sample(title, model, positive, negative, canvas, **settings)
        return self.draw.node("VAEDecode", samples=latent, vae=base.vae)["IMAGE"]


def with_hiper_and_sine(draw: Drawing) -> None:
    """One edit, three methods, one after the other."""
    make = Together(draw)
    draw.note(
        "# Three methods in one edit (HiPer, SINE, EZIGen)\nEach holds another part of your one picture, at another "
        "place of the sampling: **SINE** lets a model that was tuned on the picture guide the first 60 % of the steps, "
        "which lay out pose and place; **HiPer** puts the subject into the prompt, as a few rows behind its words; "
        "**EZIGen** looks at the subject's picture in the last 40 %, where surface and colour come. Four pictures from "
        "the same noise show what each adds: the prompt alone, with the rows, with the guidance too, with the adapter "
        "too.\n\n**First** load your picture, describe it plainly in 'Source prompt', and write the edit in 'Edit "
        "prompt'; keep 'sks' and the subject's word in 'Training prompt'. Paint the subject in the MaskEditor, for the "
        "adapter, and write what it is in 'What the subject is'.\n\nToo close to the picture: raise base_weight in "
        "'Guide by the tuned model' (0.8), or lower its "
        "end_percent; the scale in 'Subject in the edit prompt'; split_ratio in 'Look in the last part'. To leave a "
        "method out, bypass its node of that name: its place in the row then shows the one before. Both trainings run "
        "once, and are kept. All three work on the one checkpoint; the adapter decides which: the published one is for "
        "SD2.1-base, one that you trained for SD1.x takes that.\n\n" + MODELS + SCORE_ROWS + FIND_ROWS + FIND_NOTE,
        1120,
    )
    base = make.checkpoint(SD21)
    adapter = make.adapter()
    draw.column()
    picture = make.cut_out()
    square = draw.node(
        "ImageScale",
        "To the model's size",
        image=picture.whole,
        upscale_method="lanczos",
        width=SIZE,
        height=SIZE,
        crop="center",
    )["IMAGE"]
    draw.column()
    source = make.prompt("Source prompt", base.clip, SOURCE)
    trained_text = make.text("Training prompt", TRAINED)
    trained = make.prompt("Training prompt, encoded", base.clip, trained_text)
    edit_text = make.text("Edit prompt", EDIT)
    plain = make.prompt("Edit prompt, encoded", base.clip, edit_text)
    negative = make.prompt("Negative of the first sampling", base.clip, NEGATIVE)
    canvas = make.canvas()
    draw.column()
    embedding = make.rows(base, square, source)
    tuned = make.tuned(base, square, trained_text, trained)
    draw.column()
    about = make.prompt("What the subject is", base.clip, CLASS)
    subject = make.encode("Look at the subject", base, about, picture)
    draw.node("PreviewImage", "What is looked at", images=subject["seen"])
    draw.column()
    carried = draw.node(
        "LikenessApplyEmbedding",
        "Subject in the edit prompt",
        conditioning=plain,
        embedding=embedding,
        model=base.model,
        scale=ROWS_SCALE,
    )["conditioning"]
    guided = draw.node(
        "LikenessGuidance",
        "Guide by the tuned model",
        model=base.model,
        tuned=tuned,
        tuned_positive=trained,
        base_weight=BASE_WEIGHT,
        end_percent=END_PERCENT,
    )["model"]
    looking = draw.node(
        "LikenessApplyAdapter", "Look in the last part", model=guided, adapter=adapter, subject=subject["subject"]
    )["model"]
    draw.column()
    rows = (
        ("Prompt alone", base.model, plain),
        ("With the rows", base.model, carried),
        ("Guided too", guided, carried),
        ("All three", looking, carried),
    )
    results = [make.in_stages(f"Sample: {title.lower()}", base, *given, negative, canvas) for title, *given in rows]
    draw.column()
    for (title, *_), image in zip(rows, results, strict=True):
        make.save(title, image, f"ezigen_{title.lower().replace(' ', '_')}")
    draw.column()
    scores(make, results, subject["seen"], edit_text)


def scores(make: Zero, images: list[Output], reference: Output, text: Output) -> None:
    """All four, in a group that is switched off."""
    dino, clip = make.vision()
    batch, nodes = images[0], []
    for image in images[1:]:
        nodes.append(make.draw.node("ImageBatch", image1=batch, image2=image))
        batch = nodes[-1]["IMAGE"]
    score = score_node(make.draw, batch, reference, text, dino, clip)
    shown = make.save("Scores", score["picture"], "ezigen_scores")
    make.draw.group("Scores", [dino, clip, *nodes, score, shown], bypassed=True)


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "ezigen_any_picture": any_picture,
    "ezigen_edit": edit,
    "ezigen_with_hiper_and_sine": with_hiper_and_sine,
}
