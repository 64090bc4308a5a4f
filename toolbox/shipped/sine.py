"""The shipped graphs of SINE: a model tuned on one picture guides the base model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..drawing import Drawing, Node, Output
from .pieces import CFG, MODEL_NOTE, OFF_NOTE, SEED, VISION_NOTE, Pieces, score_node

STEPS, SCHEDULER = 100, "ddim_uniform"  # the authors' sampling
WHOLE_STEPS, PATCH_STEPS = 800, 1000  # of training on the whole picture, and on patches of it
BASE_WEIGHT, END_PERCENT = 0.7, 0.6
TRAINED, EDIT = "photo of a sks dog", "a photo of a dog wearing a red scarf"
WIDE_TRAINED, WIDE_EDIT, WIDE = "picture of a sks castle", "a children's painting of a castle", (1024, 768)
COST = (
    "A training runs once: queueing again only samples, and Cancel loses nothing. If it does not fit your card, "
    "switch "
    "on checkpointing, an advanced input of the training. A guided picture takes about 1.3 times as long as a plain "
    "one. Make several and choose: raise batch_size in 'Size of the results', or change the samplers' seed, not the "
    "training's.\n\n"
)
SQUARE = (
    "Leave 'Size of the results' at the training's 512 x 512; other sizes need patches, as in 'sine_edit_wide'. For "
    "SDXL set 1024 in 'To the model's size', in the training's resolution and in 'Size of the results'.\n\n"
)
FIRST = (
    "**First** load your own picture in 'Picture of the subject' (example.png only holds its place). In the training "
    "prompt keep 'sks', a word that means nothing yet, and put one plain word for your subject behind it; use that "
    "word in the edit too, without 'sks': 'photo of a sks cat', 'a photo of a cat wearing a red scarf'. "
)


class Guided(Pieces):
    """Tuning on a picture, and sampling with the tuned model's guidance."""

    def tune(
        self, title: str, model: Node, picture: Output, text: Output, positive: Output, **more: bool | int
    ) -> Node:
        """On the whole picture, for results of its own size, unless told otherwise."""
        settings: dict[str, Any] = {"patches": False, "steps": WHOLE_STEPS, **more}
        return self.draw.node(
            "LikenessFineTune",
            title,
            extra=140,
            model=model["MODEL"],
            vae=model["VAE"],
            image=picture,
            prompt=text,
            positive=positive,
            seed=SEED,
            **settings,
        )

    def guide(self, title: str, model: Node, tuned: Output, trained: Output, **more: Any) -> Output:
        settings: dict[str, Any] = {"base_weight": BASE_WEIGHT, "end_percent": END_PERCENT, **more}
        node = self.draw.node(
            "LikenessGuidance", title, model=model["MODEL"], tuned=tuned, tuned_positive=trained, **settings
        )
        return node["model"]

    def guided_sample(self, title: str, model: Output, positive: Output, negative: Output, canvas: Output) -> Output:
        return self.sample(title, model, positive, negative, canvas, steps=STEPS, scheduler=SCHEDULER)

    def save(self, title: str, image: Output, name: str) -> Node:
        return self.draw.node("SaveImage", title, images=image, filename_prefix=f"likeness/{name}")


def edit(draw: Drawing) -> None:
    """Tune on one picture and edit it, at the size of the training."""
    make = Guided(draw)
    draw.note(
        "# Edit one picture with a tuned model (SINE)\nDraws your picture anew with a change: pose, place and "
        "colours "
        "stay, details may change. It trains a LoRA on the one picture (the tuned model), then makes the edit three "
        "times from the same noise: by the base model alone, by the tuned model alone (it knows little but the "
        "picture) and by the base model guided by the tuned one.\n\n"
        + FIRST
        + "The picture is cut to a 512 x 512 square. Closer to the picture: in 'Guide by the tuned model' lower "
        "base_weight to 0.6 or 0.5, or raise end_percent. More of the edit: the other way; 'sine_sweep' shows both. "
        "The tuned model is saved in models/loras/likeness for 'sine_load_and_edit'.\n\n"
        + SQUARE
        + COST
        + MODEL_NOTE
        + VISION_NOTE
        + OFF_NOTE,
        980,
    )
    model = make.model()
    draw.column()
    picture = make.subject()
    trained_text = make.text("Training prompt", TRAINED)
    edit_text = make.text("Prompt of the edit", EDIT)
    draw.column()
    trained = make.prompt("Training prompt, encoded", model["CLIP"], trained_text)
    positive = make.prompt("Prompt of the edit, encoded", model["CLIP"], edit_text)
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    tuned = make.tune("Learn the picture", model, picture, trained_text, trained)
    draw.column()
    draw.node("LossGraphNode", "Loss curve", extra=260, loss=tuned["loss"], filename_prefix="likeness/loss")
    draw.node("LikenessSaveTuned", "Save the tuned model", lora=tuned["lora"])
    guided = make.guide("Guide by the tuned model", model, tuned["model"], trained)
    draw.column()
    results = [
        make.decode(make.guided_sample(title, sampled, positive, negative, canvas), model)
        for title, sampled in (("Alone", model["MODEL"]), ("Tuned", tuned["model"]), ("Guided", guided))
    ]
    draw.column()
    for title, image, name in zip(
        ("Base model alone", "Tuned model alone", "Guided edit"), results, ("alone", "tuned", "guided"), strict=True
    ):
        make.save(title, image, f"sine_{name}")
    draw.column()
    dino, clip = make.vision()
    both = draw.node("ImageBatch", "Alone, guided", image1=results[0], image2=results[2])
    score = score_node(draw, both["IMAGE"], picture, edit_text, dino, clip)
    shown = make.save("Scores", score["picture"], "sine_scores")
    draw.group("Scores", [dino, clip, both, score, shown], bypassed=True)


def edit_wide(draw: Drawing) -> None:
    """The same with another shape and size of the result, and with the GUIDER instead of the MODEL patch."""
    make = Guided(draw)
    draw.note(
        "# Edit at another shape and size (SINE)\nThe model is tuned on patches of the whole picture, squeezed to a "
        "square, together with a map that says where in the picture a patch lies. The map then holds for any size: "
        "here 1024 x 768 from a model of 512 x 512. The upper result, by the base model alone, has never seen your "
        "picture and often repeats things at such sizes; far above 1024 the guided one may too.\n\n"
        + FIRST
        + "Set 'Size of the results' to your picture's shape, in multiples of 64 (1024 x 768, 768 x 1024 "
        "upright, 960 x "
        "640); another shape stretches the scene to it. 1000 steps are for a first look, 2000 to 3000 for a good "
        "one: the training goes on where it ended. This graph uses the guider and SamplerCustomAdvanced; Subject "
        "Guidance with a KSampler, as in 'sine_edit', gives the same pictures. The tuned model is saved for "
        "'sine_stock_loader'.\n\n" + COST + MODEL_NOTE,
        820,
    )
    model = make.model()
    picture = draw.node("LoadImage", "Picture of the subject", image="example.png")["IMAGE"]
    draw.column()
    trained_text = make.text("Training prompt", WIDE_TRAINED)
    trained = make.prompt("Training prompt, encoded", model["CLIP"], trained_text)
    positive = make.prompt("Prompt of the edit", model["CLIP"], WIDE_EDIT)
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    draw.column()
    tuned = make.tune(
        "Learn patches of the picture", model, picture, trained_text, trained, patches=True, steps=PATCH_STEPS
    )
    draw.node("LikenessSaveTuned", "Save the tuned model", lora=tuned["lora"], filename_prefix="likeness/tuned_patches")
    draw.column()
    prompts: dict[str, Any] = {"model": model["MODEL"], "positive": positive, "negative": negative, "cfg": CFG}
    alone = draw.node("CFGGuider", "Base model alone", **prompts)["GUIDER"]
    guided = draw.node(
        "LikenessGuider",
        "Guided by the tuned model",
        **prompts,
        tuned=tuned["model"],
        tuned_positive=trained,
        base_weight=BASE_WEIGHT,
        end_percent=END_PERCENT,
    )["guider"]
    images = sample_with_guiders(make, model, {"Sample alone": alone, "Sample guided": guided})
    draw.column()
    make.save("Wide, base model alone", images[0], "sine_wide_alone")
    make.save("Wide, guided edit", images[1], "sine_wide_guided")


def sample_with_guiders(make: Guided, model: Node, guiders: dict[str, Output]) -> list[Output]:
    """The pictures of SamplerCustomAdvanced by the titles of its nodes, all from the same noise."""
    draw = make.draw
    noise = draw.node("RandomNoise", "Noise", noise_seed=SEED)["NOISE"]
    sampler = draw.node("KSamplerSelect", "Sampler", sampler_name="euler")["SAMPLER"]
    sigmas = draw.node("BasicScheduler", "Steps", model=model["MODEL"], scheduler=SCHEDULER, steps=STEPS)["SIGMAS"]
    canvas = make.canvas(*WIDE)
    draw.column()
    images = []
    for title, guider in guiders.items():
        sampled = draw.node(
            "SamplerCustomAdvanced",
            title,
            extra=260,
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=canvas,
        )
        images.append(make.decode(sampled["output"], model))
    return images


def style_transfer(draw: Drawing) -> None:
    """Content of one picture, style of another: two tuned models at once."""
    make = Guided(draw)
    draw.note(
        "# The content of one picture in the style of another (SINE)\nTwo tuned models guide the base model, one "
        "tuned "
        "on the content and one on the style. 'Guide by both' has a base_weight of 0.6, so the content weighs 0.4; "
        "'Style' weighs 0.5, and 0.1 is left to the base model and its prompt. These, and cfg 10, are the authors' "
        "values for two models; for more of the content lower the weight of 'Style' first. The result 'Content "
        "alone' "
        "is from the same noise.\n\n**First** load both pictures (they are cut to squares), and say in the "
        "training prompts what they show: "
        "'photo of a sks dog' for the content, 'painting in the sks style' for the style. The prompt for both says "
        "what the result is. Two models are trained.\n\n" + SQUARE + COST + MODEL_NOTE,
        740,
    )
    model = make.model()
    draw.column()
    content, style = make.subject("Picture of the content"), make.subject("Picture of the style")
    draw.column()
    texts = (
        make.text("Content's training prompt", TRAINED),
        make.text("Style's training prompt", "painting in the sks style"),
    )
    prompts = [
        make.prompt(f"{name}, encoded", model["CLIP"], text)
        for name, text in zip(("Content", "Style"), texts, strict=True)
    ]
    positive = make.prompt("Prompt for both", model["CLIP"], "a painting of a dog")
    negative = make.prompt("Negative prompt", model["CLIP"], "")
    canvas = make.canvas()
    draw.column()
    tuned = [
        make.tune(title, model, picture, text, prompt)["model"]
        for title, picture, text, prompt in zip(
            ("Learn the content", "Learn the style"), (content, style), texts, prompts, strict=True
        )
    ]
    draw.column()
    subject = draw.node(
        "LikenessSubjectModel", "Style", model=tuned[1], positive=prompts[1], weight=0.5, end_percent=END_PERCENT
    )
    one = make.guide("Guide by the content", model, tuned[0], prompts[0], base_weight=0.6)
    two = make.guide("Guide by both", model, tuned[0], prompts[0], base_weight=0.6, subjects=subject["subjects"])
    draw.column()
    images = [
        make.decode(
            make.sample(title, guided, positive, negative, canvas, steps=STEPS, scheduler=SCHEDULER, cfg=10.0), model
        )
        for title, guided in (("Sample content", one), ("Sample both", two))
    ]
    draw.column()
    make.save("Content alone", images[0], "sine_content")
    make.save("Content and style", images[1], "sine_style_transfer")


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "sine_edit": edit,
    "sine_edit_wide": edit_wide,
    "sine_style_transfer": style_transfer,
}
