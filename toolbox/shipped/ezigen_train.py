"""The shipped graph that trains EZIGen's adapter on a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable

from ..drawing import Drawing
from .ezigen import FIND_NOTE, FIND_ROWS, MODELS, NEGATIVE, SAMPLER, SCENE, SCHEDULER, SD21, STEPS, Zero
from .pieces import SEED, SIZE

FOLDER = "my_subjects"
TRAINING_STEPS, LEARNING_RATE = 2000, 2e-5
RATIO = 0.6  # of the steps look at the subject: more than elsewhere, as there are no loops
TREE = """```
input/my_subjects/
    dog_01/
        a.png         a picture
        a.txt         its caption
        a.mask.png    white on the dog
        b.jpg, b.txt, b.mask.png
    old_cup/ ...
```
"""


def train(draw: Drawing) -> None:
    """On from the published adapter, with a look at what that changed."""
    make = Zero(draw)
    draw.note(
        "# Train the adapter on pictures of your own (EZIGen)\nThe published adapter has seen all sorts of things. "
        "Here it goes on with yours: people, toys, logos, whatever it is weak at. It learns how to look at subjects of "
        "that kind; it does not learn one subject, for which 'ezigen_generate' needs no training.\n\n**First** make a "
        "folder in ComfyUI's input folder, press R and choose it in 'Train':\n\n" + TREE + "\nOne folder for each "
        "subject, called by its class noun (numbers behind it do not count; a name such as 'rex' needs a class.txt "
        "with "
        "'dog' in it); better two to five pictures of each, in different places: beside every "
        "picture the others are shown, cut out by their masks. Captions name the place ('a dog on a beach'). 20 "
        "subjects are a beginning, 200 are good. 'Report' says what was left out and why.\n\nThen load a subject that "
        "is **not** in the folder in 'Picture of the subject' and paint it in the MaskEditor: the pictures at the "
        "right show the prompt alone, the adapter as it was and the trained one, from the same noise. They are a quick "
        "look, without EZIGen's loops: 'ezigen_generate' brings in more of the subject.\n\nThe authors "
        "made about two steps a second on an A100: 2000 take a quarter of an hour there. The loss jumps with every "
        "sample: judge by 'Report', where the error with the subject must be the lowest of the three, and by the "
        "pictures. Cancel whenever you like: queued again, it goes on. 'Save the adapter' writes it into "
        "models/likeness_adapters, for all other graphs. With less than about 16 GB (an estimate) switch "
        "'checkpointing' on.\n\n"
        "Without anything connected to 'adapter' training begins as the authors' did, and needs 100,000 steps and a "
        "large set: that is for the command-line trainer, on several GPUs (docs/train_adapter.md in the pack's git "
        "repository).\n\n" + MODELS + FIND_ROWS + FIND_NOTE,
        1320,
    )
    base = make.checkpoint(SD21)
    before = make.adapter()
    draw.column()
    trained = draw.node(
        "LikenessTrainAdapter",
        "Train",
        extra=420,
        model=base.model,
        clip=base.clip,
        vae=base.vae,
        folder=FOLDER,
        size=SIZE,
        steps=TRAINING_STEPS,
        learning_rate=LEARNING_RATE,
        seed=SEED,
        adapter=before,
    )
    draw.column()
    draw.node("LossGraphNode", "Loss", extra=260, loss=trained["loss"], filename_prefix="likeness/loss")
    draw.node("PreviewAny", "Report", extra=160, source=trained["report"])
    draw.node("LikenessExtractAdapter", "Save the adapter", adapter=trained["adapter"])
    draw.column()
    subject = make.subject(base)
    draw.column()
    positive = make.prompt("Scene", base.clip, SCENE)
    negative = make.prompt("Negative of the first sampling", base.clip, NEGATIVE)
    canvas = make.canvas()
    models = {
        "Prompt alone": base.model,
        "Adapter as it was": make.look("Look as it was", base, before, subject, RATIO),
        "Trained adapter": make.look("Look as trained", base, trained["adapter"], subject, RATIO),
    }
    draw.column()
    ways = {"steps": STEPS, "sampler_name": SAMPLER, "scheduler": SCHEDULER}
    images = {}
    for title, model in models.items():
        latent = make.sample(f"Sample: {title.lower()}", model, positive, negative, canvas, **ways)
        images[title] = draw.node("VAEDecode", samples=latent, vae=base.vae)["IMAGE"]
    draw.column()
    for title, image in images.items():
        make.save(title, image, f"ezigen_{title.lower().replace(' ', '_')}")


GRAPHS: dict[str, Callable[[Drawing], None]] = {"ezigen_train_adapter": train}
