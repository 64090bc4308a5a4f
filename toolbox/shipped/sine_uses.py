"""More shipped graphs of SINE: uses of one tuned model, saved models, and the sweep over its two settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..drawing import Drawing
from .pieces import MODEL_NOTE, OFF_NOTE, VISION_NOTE, score_node
from .sine import COST, EDIT, FIRST, SCHEDULER, SQUARE, TRAINED, WIDE, WIDE_EDIT, WIDE_TRAINED, Guided

SAVED, SAVED_PATCHES = "likeness/tuned_00001_.safetensors", "likeness/tuned_patches_00001_.safetensors"
SAME = "With the picture and the training prompt of 'sine_edit', that training is not done again.\n\n"
SWEEP_STEPS = 50
STYLE = "painting in the sks style"
FACE = "photo of a sks woman"
FACE_EDITS = (
    ("Stylise", "a watercolor painting of a woman", 0.6),
    ("Accessory", "a photo of a woman wearing glasses", 0.7),
    ("Age", "an old woman", 0.7),
)


def style_generation(draw: Drawing) -> None:
    """Anything in the style of one picture."""
    make = Guided(draw)
    draw.note(
        "# New pictures in the style of one picture (SINE)\nTunes the model on one picture as 'painting in the sks "
        "style' and lets it guide a prompt for something else: here a forest, by the base model alone and "
        "guided, from "
        "the same noise.\n\n**First** load the picture whose style you want (it is cut to a square), and write in "
        "'Prompt' what to paint. Lower base_weight for more of the style, and of the picture itself.\n\n"
        + SQUARE
        + COST
        + MODEL_NOTE,
        640,
    )
    model = make.model()
    draw.column()
    picture = make.subject("Picture of the style")
    trained_text = make.text("Style's training prompt", STYLE)
    draw.column()
    trained = make.prompt("Style's training prompt, encoded", model["CLIP"], trained_text)
    positive = make.prompt("Prompt", model["CLIP"], "a painting of a forest")
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    tuned = make.tune("Learn the style", model, picture, trained_text, trained)
    guided = make.guide("Guide by the style", model, tuned["model"], trained)
    draw.column()
    rows = [("Without the style", model["MODEL"], "plain"), ("In the style", guided, "style")]
    images = [
        make.decode(make.guided_sample(f"Sample {name}", sampled, positive, negative, canvas), model)
        for _, sampled, name in rows
    ]
    draw.column()
    for (title, _, name), image in zip(rows, images, strict=True):
        make.save(title, image, f"sine_generation_{name}")


def remove_content(draw: Drawing) -> None:
    """Name a part of the picture in the training, and leave it out afterwards."""
    make = Guided(draw)
    draw.note(
        "# Remove something from the picture (SINE)\nThe training prompt names what is to go: 'photo of a sks "
        "dog with "
        "a flower in its mouth'. Then both models are asked without it, the base model for 'a photo of a dog' "
        "and the "
        "tuned one for 'photo of a sks dog'. The first result still names it, for comparison, from the same noise."
        "\n\n**First** load your own picture (it is cut to a square). 'Training prompt with it' says what it "
        "shows, the "
        "thing included, 'Training prompt without it' the same with the thing left out; 'Prompt with it' and 'Prompt "
        "without it' are the same two without 'sks'. The rest may change too. If the thing stays, "
        "raise base_weight to 0.8.\n\n" + SQUARE + COST + MODEL_NOTE,
        680,
    )
    model = make.model()
    draw.column()
    picture = make.subject()
    trained_text = make.text("Training prompt with it", "photo of a sks dog with a flower in its mouth")
    draw.column()
    prompts = {
        title: make.prompt(title, model["CLIP"], text)
        for title, text in (
            ("Training prompt with it, encoded", trained_text),
            ("Training prompt without it", TRAINED),
            ("Prompt with it", "a photo of a dog with a flower in its mouth"),
            ("Prompt without it", "a photo of a dog"),
            ("Negative prompt", ""),
        )
    }
    canvas = make.canvas()
    draw.column()
    tuned = make.tune("Learn the picture", model, picture, trained_text, prompts["Training prompt with it, encoded"])
    draw.column()
    rows = (
        ("Still there", "Training prompt with it, encoded", "Prompt with it", "kept"),
        ("Removed", "Training prompt without it", "Prompt without it", "removed"),
    )
    guided = [
        make.guide(f"Guide, {name}", model, tuned["model"], prompts[tuned_prompt]) for _, tuned_prompt, _, name in rows
    ]
    draw.column()
    images = [
        make.decode(
            make.guided_sample(f"Sample {row[3]}", patched, prompts[row[2]], prompts["Negative prompt"], canvas), model
        )
        for row, patched in zip(rows, guided, strict=True)
    ]
    draw.column()
    for (title, _, _, name), image in zip(rows, images, strict=True):
        make.save(title, image, f"sine_{name}")


def faces(draw: Drawing) -> None:
    """Three edits of one face."""
    make = Guided(draw)
    draw.note(
        "# Edit a face (SINE)\nTunes the model on one portrait and makes three edits from the same noise: a painting "
        "of it, glasses, and old age. The painting has a base_weight of 0.6, the paper's for its watercolor.\n\n"
        "**First** load a portrait, cut so that the face fills most of it, and change 'woman' in all prompts if need "
        "be; keep 'sks' in the training prompt. 800 steps are a start: if the result is someone else, go on to "
        "1200 or "
        "1600 steps in 'Learn the face', then lower base_weight or raise end_percent in the guidance.\n\nUse "
        "pictures "
        "of people only with their consent.\n\n" + SQUARE + COST + MODEL_NOTE,
        720,
    )
    model = make.model()
    draw.column()
    picture = make.subject("Portrait")
    trained_text = make.text("Training prompt", FACE)
    draw.column()
    trained = make.prompt("Training prompt, encoded", model["CLIP"], trained_text)
    edits = [make.prompt(f"{title} prompt", model["CLIP"], text) for title, text, _ in FACE_EDITS]
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    tuned = make.tune("Learn the face", model, picture, trained_text, trained)
    draw.column()
    guided = [
        make.guide(f"{title} guidance", model, tuned["model"], trained, base_weight=weight)
        for title, _, weight in FACE_EDITS
    ]
    draw.column()
    images = [
        make.decode(make.guided_sample(f"{title} sampling", patched, positive, negative, canvas), model)
        for (title, _, _), patched, positive in zip(FACE_EDITS, guided, edits, strict=True)
    ]
    draw.column()
    for (title, _, _), image in zip(FACE_EDITS, images, strict=True):
        make.save(title, image, f"sine_face_{title.lower()}")


def load_and_edit(draw: Drawing) -> None:
    """Use a saved tuned model in new prompts."""
    make = Guided(draw)
    draw.note(
        "# Load a tuned model and edit\nTakes a model that 'sine_edit' has saved into three new prompts, from "
        "the same "
        "noise. Its training prompt comes with the file (and the position map with one of 'sine_edit_wide': only "
        "then "
        "may the size differ from 512 x 512). Run 'sine_edit' once first, choose its "
        "file in 'Saved model' (press R if the list does not show it), and name in the prompts what your picture "
        "shows.\n\n" + COST + MODEL_NOTE,
        540,
    )
    model = make.model()
    loaded = draw.node("LikenessLoadTuned", "Saved model", model=model["MODEL"], clip=model["CLIP"], name=SAVED)
    draw.node("PreviewAny", "What it is", extra=160, source=loaded["info"])
    draw.column()
    texts = (EDIT, "a photo of a dog in the snow", "a watercolor painting of a dog")
    prompts = [make.prompt(f"Edit {index}", model["CLIP"], text) for index, text in enumerate(texts, 1)]
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    guided = make.guide("Guide by the tuned model", model, loaded["model"], loaded["positive"])
    draw.column()
    latents = [
        make.guided_sample(f"Sample {index}", guided, positive, negative, canvas)
        for index, positive in enumerate(prompts, 1)
    ]
    draw.column()
    for index, latent in enumerate(latents, 1):
        make.save(f"Result {index}", make.decode(latent, model), f"sine_loaded_{index}")


def stock_loader(draw: Drawing) -> None:
    """The same file through ComfyUI's own LoRA loader, with the position map added by hand."""
    make = Guided(draw)
    draw.note(
        "# A tuned model from a stock LoRA loader\nSaved tuned models are plain LoRA files: any loader takes "
        "them, and "
        "other LoRAs can be loaded before them. A stock loader does not know the position map of a model that was "
        "tuned on patches: put it back with 'Position map', with the cells and the interpolation of the "
        "training, and "
        "write the training prompt yourself. Without the map the tuned model shows parts of the picture in the wrong "
        "places. The log then says 'not loaded: likeness.needs_position_map': that is what 'Position map' is for.\n\n"
        "**First** run 'sine_edit_wide' once, choose its file in 'Saved model' (press R if the list does not "
        "show it), "
        "and copy its two prompts and its 'Size of the results' here: the result is its guided edit again.\n\n"
        + COST
        + MODEL_NOTE,
        640,
    )
    model = make.model()
    draw.column()
    loaded = draw.node(
        "LoraLoaderModelOnly", "Saved model", model=model["MODEL"], lora_name=SAVED_PATCHES, strength_model=1.0
    )
    mapped = draw.node("LikenessPositionMap", "Position map", model=loaded["MODEL"])
    draw.column()
    trained = make.prompt("Training prompt", model["CLIP"], WIDE_TRAINED)
    positive = make.prompt("Prompt of the edit", model["CLIP"], WIDE_EDIT)
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas(*WIDE)
    draw.column()
    guided = make.guide("Guide by the tuned model", model, mapped["model"], trained)
    latent = make.guided_sample("Sample", guided, positive, negative, canvas)
    draw.column()
    make.save("Guided edit", make.decode(latent, model), "sine_stock")


def sweep(draw: Drawing) -> None:
    """One edit at every pair of K and v, with scores as curves."""
    make = Guided(draw)
    draw.note(
        "# Which base_weight and end_percent? (SINE)\nMakes one edit with every pair of base_weight (v) and "
        "end_percent (K), 16 pictures "
        "from the same noise, and lays them out in a grid as the paper's figures 7 to 9 and 19 to 21 do. With the "
        "scores switched on it also draws how far each picture is from the source and how well it meets the edit "
        "prompt. To the left and down the picture wins, to the right and up the prompt.\n\n"
        + FIRST
        + SAME
        + f"16 samplings of {SWEEP_STEPS} steps take their time: in 'All pairs' write '0.5, 0.7' and '0.4, 0.6' "
        f"for a first "
        "look. Then set the best pair in 'Guide by the tuned model' of 'sine_edit'.\n\n"
        + MODEL_NOTE
        + VISION_NOTE
        + OFF_NOTE,
        700,
    )
    model = make.model()
    draw.column()
    picture = make.subject()
    trained_text, edit_text = make.text("Training prompt", TRAINED), make.text("Prompt of the edit", EDIT)
    draw.column()
    trained = make.prompt("Training prompt, encoded", model["CLIP"], trained_text)
    positive = make.prompt("Prompt of the edit, encoded", model["CLIP"], edit_text)
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    tuned = make.tune("Learn the picture", model, picture, trained_text, trained)
    draw.column()
    pairs = draw.node("LikenessSweep", "All pairs")
    settings: dict[str, Any] = {"base_weight": pairs["base_weight"], "end_percent": pairs["end_percent"]}
    guided = make.guide("Guide at each pair", model, tuned["model"], trained, **settings)
    latents = make.sample("Sample each", guided, positive, negative, canvas, steps=SWEEP_STEPS, scheduler=SCHEDULER)
    draw.column()
    images = make.decode(latents, model)
    dino, clip = make.vision()
    score = score_node(draw, images, picture, edit_text, dino, clip)
    draw.group("Scores", [dino, clip, score], bypassed=True)
    draw.column()
    plotted = draw.node(
        "LikenessSweepPlot",
        "Collect",
        images=images,
        **settings,
        distance=score["lpips"],
        identity=score["dino"],
        text=score["clip_t"],
    )
    make.save("Grid", plotted["grid"], "sine_sweep_grid")
    make.save("Curves", plotted["plot"], "sine_sweep_curves")


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "sine_style_generation": style_generation,
    "sine_remove_content": remove_content,
    "sine_faces": faces,
    "sine_load_and_edit": load_and_edit,
    "sine_stock_loader": stock_loader,
    "sine_sweep": sweep,
}
