"""The shipped graphs of HiPer: one picture's subject as a few rows of the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..drawing import Drawing, Node, Output
from .pieces import MODEL_NOTE, OFF_NOTE, ON_NOTE, SEED, VISION_NOTE, Pieces, score_node

SOURCE, TARGET = "a photo of a cat on a sofa", "a photo of a cat wearing a red scarf in the snow"
SCALE = 0.8
SAVED_STEPS = (200, 400, 700, 1000)


class Trainer(Pieces):
    """Training a subject, and putting it into a prompt."""

    def train(self, model: Node, picture: Output, positive: Output) -> Node:
        return self.draw.node(
            "LikenessTrainEmbedding",
            "Learn the subject",
            extra=420,
            model=model["MODEL"],
            positive=positive,
            image=picture,
            vae=model["VAE"],
            seed=SEED,
            preview_steps=0,
        )

    def apply(self, title: str, prompt: Output, embedding: Output, model: Node, scale: float, step: int = 0) -> Output:
        node = self.draw.node(
            "LikenessApplyEmbedding",
            title,
            conditioning=prompt,
            embedding=embedding,
            model=model["MODEL"],
            scale=scale,
            step=step,
        )
        return node["conditioning"]


@dataclass(frozen=True)
class Beginning:
    """What both training graphs start with."""

    model: Node
    picture: Output
    edit_text: Output
    edit: Output
    negative: Output
    canvas: Output
    source: Output
    trained: Node


def begin(make: Trainer) -> Beginning:
    """Model, picture, prompts and the training, column by column."""
    model = make.model()
    make.draw.column()
    picture = make.subject()
    edit_text = make.text("Edit prompt", TARGET)
    make.draw.column()
    source = make.prompt("Source prompt", model["CLIP"], SOURCE)
    edit = make.prompt("Edit prompt, encoded", model["CLIP"], edit_text)
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    make.draw.column()
    trained = make.train(model, picture, source)
    return Beginning(model, picture, edit_text, edit, negative, canvas, source, trained)


def train_and_edit(draw: Drawing) -> None:
    """Learn a subject from one picture and edit the picture with it."""
    make = Trainer(draw)
    draw.note(
        "# Train and edit\nLearns the subject of one picture as five rows of the prompt (HiPer), then makes three "
        "pictures from the same noise: the source prompt with the subject, the edit without and the edit with it.\n\n"
        "**First** load your own picture in 'Picture of the subject' (example.png only holds its place) and describe "
        "it plainly in 'Source prompt', with the place it is in: 'a photo of a cat on a sofa'. Write the edit in 'Edit "
        "prompt', and run. The picture is cut to a 512 x 512 square; for SDXL set all sizes to 1024 and learning_rate "
        "to 0.002.\n\n" + MODEL_NOTE + VISION_NOTE + OFF_NOTE,
        640,
    )
    start = begin(make)
    model, negative, canvas, trained = start.model, start.negative, start.canvas, start.trained
    draw.node("LossGraphNode", "Loss curve", extra=260, loss=trained["loss"], filename_prefix="likeness/loss")
    draw.node("LikenessSaveEmbedding", "Save the subject", embedding=trained["embedding"])
    draw.column()
    again = make.apply("Subject in the source prompt", start.source, trained["embedding"], model, 1.0)
    edited = make.apply("Subject in the edit prompt", start.edit, trained["embedding"], model, SCALE)
    draw.column()
    rows = [
        make.decode(make.sample(title, model["MODEL"], positive, negative, canvas), model)
        for title, positive in (("Reconstruct", again), ("Edit without", start.edit), ("Edit with", edited))
    ]
    draw.column()
    for title, image, name in zip(
        ("Reconstruction", "Edit without the subject", "Edit with the subject"),
        rows,
        ("reconstruction", "edit_without", "edit_with"),
        strict=True,
    ):
        draw.node("SaveImage", title, images=image, filename_prefix=f"likeness/{name}")
    draw.column()
    dino, clip = make.vision()
    both = draw.node("ImageBatch", "Without, with", image1=rows[1], image2=rows[2])
    score = score_node(draw, both["IMAGE"], start.picture, start.edit_text, dino, clip)
    shown = draw.node("SaveImage", "Scores", images=score["picture"], filename_prefix="likeness/scores")
    draw.group("Scores", [dino, clip, both, score, shown], bypassed=True)


def load_and_reuse(draw: Drawing) -> None:
    """Use a saved subject in new prompts."""
    make = Trainer(draw)
    draw.note(
        "# Load and reuse\nTakes a subject saved by 'Train and edit' into three new prompts, all from the same noise. "
        "Run 'Train and edit' once first, choose its file in 'Saved subject' (press R if the list does not show it), "
        "and name your subject's class in the prompts. Lower the scale when the edit does not come through, raise it "
        "towards 1 when the subject is not the same.\n\n" + MODEL_NOTE,
        420,
    )
    model = make.model()
    loaded = draw.node("LikenessLoadEmbedding", "Saved subject", name="likeness/subject_00001_.safetensors")
    draw.node("PreviewAny", "What it is", extra=160, source=loaded["info"])
    draw.column()
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    texts = ("a photo of a cat on the beach", "a photo of a cat in front of a brick wall", "an oil painting of a cat")
    prompts = [make.prompt(f"Prompt {index}", model["CLIP"], text) for index, text in enumerate(texts, 1)]
    draw.column()
    applied = [
        make.apply(f"Subject in prompt {index}", prompt, loaded["embedding"], model, SCALE)
        for index, prompt in enumerate(prompts, 1)
    ]
    draw.column()
    latents = [
        make.sample(f"Sample {index}", model["MODEL"], positive, negative, canvas)
        for index, positive in enumerate(applied, 1)
    ]
    draw.column()
    for index, latent in enumerate(latents, 1):
        image = make.decode(latent, model)
        draw.node("SaveImage", f"Result {index}", images=image, filename_prefix=f"likeness/reuse_{index}")


def pick_the_step(draw: Drawing) -> None:
    """The same edit at several saved steps; the scores name the best."""
    make = Trainer(draw)
    draw.note(
        "# Pick the step\nLonger training keeps more of the picture and leaves less room for the edit. This graph "
        f"makes the same edit with the subject as it was after {', '.join(map(str, SAVED_STEPS))} steps and keeps "
        "the picture with the best score. Use the picture, source prompt, seed and training settings of 'Train and "
        "edit': then that run is not trained again.\n\n" + MODEL_NOTE + VISION_NOTE + ON_NOTE,
        560,
    )
    start = begin(make)
    model, negative, canvas, trained = start.model, start.negative, start.canvas, start.trained
    draw.column()
    applied = [
        make.apply(f"After {step} steps", start.edit, trained["embedding"], model, SCALE, step) for step in SAVED_STEPS
    ]
    draw.column()
    latents = [
        make.sample(f"Edit after {step} steps", model["MODEL"], positive, negative, canvas)
        for step, positive in zip(SAVED_STEPS, applied, strict=True)
    ]
    draw.column()
    batch = latents[0]
    for latent in latents[1:]:
        batch = draw.node("LatentBatch", samples1=batch, samples2=latent)["LATENT"]
    images = make.decode(batch, model)
    draw.node("SaveImage", "All steps", images=images, filename_prefix="likeness/steps")
    draw.column()
    dino, clip = make.vision()
    score = score_node(draw, images, start.picture, start.edit_text, dino, clip)
    shown = draw.node("SaveImage", "Scores", images=score["picture"], filename_prefix="likeness/step_scores")
    best = draw.node("ImageFromBatch", "The best", image=images, batch_index=score["best"], length=1)
    saved = draw.node("SaveImage", "Best step", images=best["IMAGE"], filename_prefix="likeness/best_step")
    draw.group("Scores", [dino, clip, score, shown, best, saved])


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "hiper_train_and_edit": train_and_edit,
    "hiper_load_and_reuse": load_and_reuse,
    "hiper_pick_the_step": pick_the_step,
}
