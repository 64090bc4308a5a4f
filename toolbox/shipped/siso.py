"""The shipped graphs of SISO's generation: a LoRA optimised against the likeness of the picture itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..drawing import Drawing, Node, Output
from .pieces import CHECKPOINT_MODEL, HUB, MODEL_NOTE, SEED, SIZE, Pieces, score_node

LARGE = "dinov2-large"
RETRIEVAL = "ir_features.pth"
RETRIEVAL_PAGE = "https://www.kaggle.com/datasets/louieshao/guieweights0732"
SIMPLE, TARGET = "a photo of a dog", "a photo of a dog on the beach"
TURBO = {
    "name": "sd_xl_turbo_1.0_fp16.safetensors",
    "url": f"{HUB}/stabilityai/sdxl-turbo/resolve/main/sd_xl_turbo_1.0_fp16.safetensors",
    "directory": "checkpoints",
}
SCHNELL = {
    "name": "flux1-schnell.safetensors",
    "url": f"{HUB}/black-forest-labs/FLUX.1-schnell/resolve/main/flux1-schnell.safetensors",
    "directory": "diffusion_models",
}
ENCODERS = tuple(
    {
        "name": name,
        "url": f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/{name}",
        "directory": "text_encoders",
    }
    for name in ("clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
)
AUTOENCODER = {
    "name": "ae.safetensors",
    "url": f"{HUB}/black-forest-labs/FLUX.1-schnell/resolve/main/ae.safetensors",
    "directory": "vae",
}
HEAD = "## Models\n| file | folder | licence |\n|---|---|---|\n"
LIKENESS_ROWS = f"""| [{LARGE}]({HUB}/facebook/{LARGE}) (config.json, preprocessor_config.json, model.safetensors) \
| models/likeness_vision/{LARGE} | Apache-2.0 |
| [{RETRIEVAL}]({RETRIEVAL_PAGE}) (the .pth file, with a Kaggle account) | models/ir_features | see there; some of its \
training data is for research only |

The group "Instance retrieval" is switched off, so that '{RETRIEVAL}' need not be there; DINOv2 alone does nearly as \
well. To add it, choose the file, right-click the group's title and choose "Set Group Nodes to Always".
"""
SCORE_ROWS = f"""| [dinov2-base]({HUB}/facebook/dinov2-base) and [clip-vit-large-patch14]\
({HUB}/openai/clip-vit-large-patch14), only for the group "Scores", which is switched off too \
| models/likeness_vision | Apache-2.0, MIT |
"""
FIRST = (
    "**First** load a picture of the subject, cut square around it (only the central square is seen), and write what "
    "it is into 'Prompt of the training', in the plainest words: 'a photo of a cat', 'a photo of a vase'. "
)
HOW = (
    "'Optimize' makes a picture of the plain prompt again and again, from the same noise, and moves a small LoRA until"
    " the picture shows your subject, as DINOv2 sees it. It stops when nothing improves any more, usually after 15 to "
    "30 of the 50 pictures, and shows every one on the way. Judge by 'Most alike' first: there the likeness is "
    "largest. In other prompts it is weaker: 'With the LoRA' beside 'Without the LoRA'. Keep 'Noise' equal to 'seed' "
    "in 'Optimize', as the authors do: from other noise less of the subject is left.\n\n'Report': the loss is minus "
    "the likeness, -1 is the same, 0 nothing alike. When the best is iteration 1, or shows too little of the subject: "
    "another seed (in both places), or a higher patience (15; what was done is kept, it goes on; 0 never stops early)."
    " Too much of the picture itself: a lower learning_rate. The background comes along: paint the subject in the "
    "picture's MaskEditor and lead its MASK to 'Like the subject'.\n\n"
)


@dataclass(frozen=True)
class Recipe:
    """What is said to 'Optimize', and how a picture of the new prompt is sampled."""

    optimise: dict[str, Any]
    scheduler: str
    training_steps: int
    steps: int
    sampler: str = "euler"
    canvas: str = "EmptyLatentImage"
    reuse: dict[str, Any] = field(default_factory=dict)


MANY_STEPS = Recipe(
    {
        **{"iterations": 50, "learning_rate": 8e-4, "weight_decay": 1e-4, "patience": 5},
        **{"cfg": 4.5, "grad_steps": 3, "checkpointing": True},
    },
    scheduler="normal",
    training_steps=20,
    steps=20,
    reuse={"cfg": 4.5},
)
ONE_STEP = Recipe(
    {
        **{"iterations": 50, "learning_rate": 2e-4, "weight_decay": 1e-2, "patience": 7, "cfg": 1.0},
        **{"text_rate": 2e-4, "text_decay": 1e-2, "checkpointing": True},
    },
    scheduler="sgm_uniform",
    training_steps=1,
    steps=4,
    sampler="euler_ancestral",
    reuse={"cfg": 1.0},
)
FLUX = Recipe(
    {
        **{"iterations": 50, "learning_rate": 2e-4, "weight_decay": 1e-4, "patience": 7, "cfg": 1.0},
        **{"text_rate": 5e-6, "text_decay": 1e-3, "checkpointing": True},
    },
    scheduler="simple",
    training_steps=1,
    steps=4,
    canvas="EmptySD3LatentImage",
    reuse={"cfg": 1.0},
)


@dataclass(frozen=True)
class Base:
    """The model's three parts."""

    model: Output
    clip: Output
    vae: Output


class Likeness(Pieces):
    """A LoRA from the likeness of pictures, and pictures with it."""

    def checkpoint(self, model: dict[str, str]) -> Base:
        node = self.draw.node("CheckpointLoaderSimple", "Model", models=(model,), ckpt_name=model["name"])
        return Base(node["MODEL"], node["CLIP"], node["VAE"])

    def flux(self) -> Base:
        model = self.draw.node(
            "UNETLoader", "Model", models=(SCHNELL,), unet_name=SCHNELL["name"], weight_dtype="fp8_e4m3fn"
        )
        clip = self.draw.node(
            "DualCLIPLoader",
            "Text encoders",
            models=ENCODERS,
            clip_name1=ENCODERS[0]["name"],
            clip_name2=ENCODERS[1]["name"],
            type="flux",
        )
        vae = self.draw.node("VAELoader", "Autoencoder", models=(AUTOENCODER,), vae_name=AUTOENCODER["name"])
        return Base(model["MODEL"], clip["CLIP"], vae["VAE"])

    def picture(self, title: str) -> Output:
        return self.draw.node("LoadImage", title, image="example.png")["IMAGE"]

    def likeness(self, pictures: Output) -> Output:
        """To DINOv2 and, in a group that is switched off, to the retrieval model."""
        dino = self.draw.node("LikenessLoadVision", "DINO (similarity)", name=LARGE)
        first = self.draw.node("LikenessSimilarity", "Like the subject", vision=dino["vision"], image=pictures)
        self.draw.column()
        retrieval = self.draw.node("LikenessLoadRetrieval", "Retrieval model", name=RETRIEVAL)
        both = self.draw.node(
            "LikenessSimilarity",
            "Like it in retrieval too",
            vision=retrieval["vision"],
            image=pictures,
            similarity=first["similarity"],
        )
        self.draw.group("Instance retrieval", [retrieval, both], bypassed=True)
        return both["similarity"]

    def lora(
        self, base: Base, pictures: Output, recipe: Recipe, text_encoder: bool, name: str
    ) -> tuple[Output, Output]:
        """Learned from the pictures, saved by that name; the new picture without it and with it."""
        similarity = self.likeness(pictures)
        self.draw.column()
        learned, negative = self.learn(base, similarity, recipe, text_encoder, name)
        self.draw.column()
        return self.compare(base, learned, negative, recipe, text_encoder)

    def learn(
        self, base: Base, similarity: Output, recipe: Recipe, text_encoder: bool, name: str
    ) -> tuple[Node, Output]:
        """The optimisation with what it shows; also the empty negative prompt. name: of the LoRA's file."""
        text = self.text("Prompt of the training", SIMPLE)
        positive = self.prompt("Prompt of the training, encoded", base.clip, text)
        negative = self.prompt("Negative prompt", base.clip, "")
        canvas = self.draw.node(recipe.canvas, "Size of the pictures", width=SIZE, height=SIZE)["LATENT"]
        levels = self.levels("Steps of the training", base.model, recipe, recipe.training_steps)
        more: dict[str, Any] = {"clip": base.clip} if text_encoder else {}
        self.draw.column()
        node = self.draw.node(
            "LikenessOptimizeLora",
            "Optimize",
            extra=420,
            model=base.model,
            vae=base.vae,
            positive=positive,
            prompt=text,
            similarity=similarity,
            latent=canvas,
            sigmas=levels,
            negative=negative,
            seed=SEED,
            **recipe.optimise,
            **more,
        )
        self.draw.column()
        self.save("Most alike", node["best"], "siso_best")
        self.draw.node("PreviewImage", "All iterations", images=node["images"])
        self.draw.node("LossGraphNode", "Loss", extra=260, loss=node["loss"], filename_prefix="likeness/loss")
        self.draw.node("PreviewAny", "Report", extra=160, source=node["report"])
        self.draw.node("LikenessSaveTuned", "Save the LoRA", lora=node["lora"], filename_prefix=f"likeness/{name}")
        return node, negative

    def levels(self, title: str, model: Output, recipe: Recipe, steps: int) -> Output:
        node = self.draw.node("BasicScheduler", title, model=model, scheduler=recipe.scheduler, steps=steps)
        return node["SIGMAS"]

    def compare(
        self, base: Base, learned: Node, negative: Output, recipe: Recipe, text_encoder: bool
    ) -> tuple[Output, Output]:
        """The new prompt without and with the LoRA, from the same noise."""
        draw = self.draw
        text = self.text("Prompt of the new picture", TARGET)
        plain = self.prompt("New prompt", base.clip, text)
        tuned = self.prompt("New prompt, tuned encoder", learned["clip"], text) if text_encoder else plain
        canvas = draw.node(recipe.canvas, "Size of the new pictures", width=SIZE, height=SIZE)["LATENT"]
        noise = draw.node("RandomNoise", "Noise", noise_seed=SEED)["NOISE"]
        sampler = draw.node("KSamplerSelect", "Sampler", sampler_name=recipe.sampler)["SAMPLER"]
        levels = self.levels("Steps", base.model, recipe, recipe.steps)
        draw.column()
        images = []
        for name, model, positive in (("without", base.model, plain), ("with", learned["model"], tuned)):
            guider = draw.node(
                "CFGGuider", f"Guider {name}", model=model, positive=positive, negative=negative, **recipe.reuse
            )
            sampled = draw.node(
                "SamplerCustomAdvanced",
                f"Sample {name}",
                extra=260,
                noise=noise,
                guider=guider["GUIDER"],
                sampler=sampler,
                sigmas=levels,
                latent_image=canvas,
            )
            decoded = draw.node("VAEDecode", samples=sampled["output"], vae=base.vae)
            images.append(decoded["IMAGE"])
        draw.column()
        for name, image in zip(("Without", "With"), images, strict=True):
            self.save(f"{name} the LoRA", image, f"siso_{name.lower()}")
        return images[0], images[1]

    def save(self, title: str, image: Output, name: str) -> Node:
        return self.draw.node("SaveImage", title, images=image, filename_prefix=f"likeness/{name}")

    def scores(self, images: tuple[Output, Output], reference: Output) -> None:
        """Identity by a model that is not in the loss, and the prompt; switched off."""
        text = self.text("Prompt to score", TARGET)
        dino, clip = self.vision()
        both = self.draw.node("ImageBatch", image1=images[0], image2=images[1])
        self.draw.column()
        score = score_node(self.draw, both["IMAGE"], reference, text, dino, clip)
        shown = self.save("Scores", score["picture"], "siso_scores")
        self.draw.group("Scores", [dino, clip, both, score, shown], bypassed=True)


def row(model: dict[str, str], licence: str) -> str:
    return f"| [{model['name']}]({model['url']}) | models/{model['directory']} | {licence} |\n"


def generate(draw: Drawing) -> None:
    """SD1.x: twenty steps, the last three with a gradient."""
    make = Likeness(draw)
    draw.note(
        "# A subject from one picture, with SD1.x (SISO)\n"
        + FIRST
        + HOW
        + "SD1.x has no one-step form, so this follows the authors' recipe for Sana: 20 steps, the last 3 of them with "
        "a gradient, cfg 4.5. One iteration takes about as long as two pictures. 'Save the LoRA' writes it into "
        "models/loras, for 'siso_reuse' and every stock loader.\n\n"
        + MODEL_NOTE
        + LIKENESS_ROWS.replace("\n\n", f"\n{SCORE_ROWS}\n", 1),
        1180,
    )
    base = make.checkpoint(CHECKPOINT_MODEL)
    draw.column()
    picture = make.picture("Picture of the subject")
    images = make.lora(base, picture, MANY_STEPS, text_encoder=False, name="siso_sd15")
    draw.column()
    make.scores(images, picture)


def sdxl_turbo(draw: Drawing) -> None:
    """SDXL-turbo: one step, both text encoders too."""
    make = Likeness(draw)
    draw.note(
        "# A subject from one picture, with SDXL-turbo (SISO)\n"
        + FIRST
        + HOW
        + "The pictures of the training are made in one step, the new one in four. The LoRA is learned for both text "
        "encoders too, as published. Pictures are 512 x 512, which is what SDXL-turbo was made for. 'checkpointing' in "
        "'Optimize' (among its advanced inputs) is on: with 24 GB it can be off, which is faster. When 12 GB are not "
        "enough, disconnect 'clip' from 'Optimize' and lead the CLIP of 'Model' to 'New prompt, tuned encoder' (needs "
        "are estimated; no GPU was measured).\n\n"
        + HEAD
        + row(TURBO, "Stability AI non-commercial research")
        + LIKENESS_ROWS,
        1220,
    )
    base = make.checkpoint(TURBO)
    draw.column()
    picture = make.picture("Picture of the subject")
    make.lora(base, picture, ONE_STEP, text_encoder=True, name="siso_sdxl_turbo")


def flux(draw: Drawing) -> None:
    """FLUX.1-schnell: one step, CLIP-L too."""
    make = Likeness(draw)
    draw.note(
        "# A subject from one picture, with FLUX.1-schnell (SISO)\n"
        + FIRST
        + HOW
        + "The pictures of the training are made in one step and look blurred: that is expected, the new one is made "
        "in four and is sharp. FLUX.1 is large: it is loaded as fp8 ('weight_dtype' in 'Model') and, with DINOv2 and"
        " the gradient, wants a card of 24 GB, of 16 GB at the very least; on 12 GB take SDXL-turbo. When memory is "
        "short, disconnect 'clip' from 'Optimize' and lead the CLIP of 'Text encoders' to 'New prompt, tuned "
        "encoder': T5 is then not needed while optimising.\n\n"
        + HEAD
        + row(SCHNELL, "Apache-2.0")
        + "".join(row(model, "Apache-2.0" if "t5" in model["name"] else "MIT") for model in ENCODERS)
        + row(AUTOENCODER, "Apache-2.0")
        + LIKENESS_ROWS,
        1260,
    )
    base = make.flux()
    draw.column()
    picture = make.picture("Picture of the subject")
    make.lora(base, picture, FLUX, text_encoder=True, name="siso_flux")


def references(draw: Drawing) -> None:
    """Several pictures of the subject."""
    make = Likeness(draw)
    draw.note(
        "# A subject from several pictures, with SD1.x (SISO)\nAs 'siso_generate', with more than one picture of the "
        "subject: the mean likeness to them counts, so that what only one of them shows (its background, its light) "
        "counts less.\n\n"
        + FIRST
        + "More pictures: join them with more 'Batch Images' nodes, all of one shape (the first one's).\n\n"
        + HOW
        + MODEL_NOTE
        + LIKENESS_ROWS,
        1080,
    )
    base = make.checkpoint(CHECKPOINT_MODEL)
    draw.column()
    first = make.picture("Picture of the subject")
    second = make.picture("Picture 2 of the subject")
    both = draw.node("ImageBatch", "Both pictures", image1=first, image2=second)["IMAGE"]
    draw.column()
    make.lora(base, both, MANY_STEPS, text_encoder=False, name="siso_references")


GRAPHS: dict[str, Callable[[Drawing], None]] = {
    "siso_generate": generate,
    "siso_sdxl_turbo": sdxl_turbo,
    "siso_flux": flux,
    "siso_references": references,
}
