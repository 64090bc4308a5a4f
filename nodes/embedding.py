"""Train and apply an embedding of a subject (HiPer)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.embedding import hiper
from ..core.embedding.host.train import (
    Previews,
    RegularizerOptions,
    Schedule,
    TrainingPrompts,
    preview_images,
    train_embedding,
)
from ..core.prompt.conditioning import apply_embedding
from ..core.session.fingerprint import check_base
from ..core.session.images import ImageSource
from ..core.session.outputs import loss_map, nothing
from .types import Embedding, LossMap, advanced, schema, seed_input

SOURCE, EMPTY = "source prompt", "empty prompt"
ANCHORS = ("in the loss", "decoupled")


def anchor_inputs(weight: float) -> list[io.Input]:
    """HiFi Tuner's regulariser, with this default weight."""
    return [
        *advanced(
            io.Float.Input(
                "anchor_weight",
                default=weight,
                min=0.0,
                max=1.0,
                step=0.001,
                round=1e-6,
                optional=True,
                tooltip="Holds the rows near those of the empty prompt connected to 'negative' (HiFi Tuner; 0.01 is "
                "usual), which keeps the prompt obeyed. 0 is off, as in HiPer.",
            ),
            io.Combo.Input(
                "anchor",
                options=list(ANCHORS),
                default=ANCHORS[0],
                optional=True,
                tooltip="How the anchor holds: as a term of the loss, as published, or as a pull beside the gradient, "
                "which Adam does not rescale; that form wants a larger weight (0.1 to 1).",
            ),
        ),
    ]


def image_inputs(vae: str) -> list[io.Input]:
    """What is learned from; vae: the tooltip of that input."""
    return [
        io.Latent.Input(
            "latent", optional=True, tooltip="The image(s) to learn from, encoded. Instead of image and VAE."
        ),
        io.Image.Input(
            "image", optional=True, tooltip="The image(s) to learn from, at the model's size. Needs the VAE."
        ),
        io.Vae.Input("vae", optional=True, tooltip=vae),
        io.Mask.Input(
            "mask", optional=True, tooltip="White where the subject is: the rest of the image is not learned."
        ),
    ]


def held(negative: list | None, weight: float, anchor: str) -> RegularizerOptions | None:
    """The anchor that the inputs ask for."""
    if weight == 0.0:
        return None
    if negative is None:
        raise ValueError(
            f"anchor_weight is {weight} but nothing is connected to 'negative': connect the empty prompt there, or "
            "set anchor_weight to 0."
        )
    return RegularizerOptions(negative, weight, anchor == ANCHORS[1])


class LikenessTrainEmbedding(io.ComfyNode):
    """MODEL + one image + the prompt that describes it -> the last n rows of that prompt, learned."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessTrainEmbedding",
            display_name="Train Subject Embedding (HiPer)",
            category="likeness/embedding",
            description="Learns a subject from one image as a few token vectors at the end of the prompt (HiPer, "
            "akin to textual inversion). The model itself stays as it is.",
            search_aliases=["hiper", "textual inversion", "personalize", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The model to learn for. It is not changed."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The source prompt: a plain description of the image, such as 'a standing cat'. It "
                    "must leave "
                    "as many unused rows as there are tokens.",
                ),
                io.Int.Input(
                    "steps",
                    default=hiper.STEPS,
                    min=1,
                    max=100_000,
                    tooltip="Number of updates. 300 to 1000 is usual; many more cost the ability to edit. Asking for "
                    "more later goes on where this run ended. Asking for fewer gives that step when it was kept, else "
                    "the longer run with a warning.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=hiper.LEARNING_RATE,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=1e-6,
                    tooltip="Adam's learning rate. 0.005 for SD1.x, 0.002 for SDXL; try 0.001 to 0.01.",
                ),
                io.Int.Input(
                    "tokens",
                    default=hiper.TOKENS,
                    min=1,
                    max=75,
                    tooltip="How many rows of the prompt hold the subject. 3 to 8: more keep more of the image and "
                    "leave "
                    "less room for the edit.",
                ),
                io.Int.Input(
                    "save_every",
                    default=hiper.SAVE_EVERY,
                    min=1,
                    max=100_000,
                    tooltip="Keep the embedding at every so many steps, to choose the best later.",
                ),
                io.Combo.Input(
                    "init",
                    options=[SOURCE, EMPTY],
                    default=SOURCE,
                    tooltip="Where the rows start: the source prompt's own unused rows (HiPer), or those of the "
                    "empty prompt "
                    "connected to 'negative' (HiFi Tuner).",
                ),
                seed_input(
                    "Decides timesteps, noise and the previews' noise. The same seed gives the same bytes on a "
                    "CPU; on a GPU up to rounding."
                ),
                *advanced(
                    io.Float.Input(
                        "start_percent",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="First part of the denoising that is trained on: 0 is pure noise.",
                    ),
                    io.Float.Input(
                        "end_percent",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Last part of the denoising that is trained on: 1 is the finished image.",
                    ),
                    io.Int.Input(
                        "preview_steps",
                        default=20,
                        min=0,
                        max=1000,
                        tooltip="Sampling steps of each preview image; 0 makes none. Needs the VAE.",
                    ),
                    io.Float.Input(
                        "preview_cfg",
                        default=7.5,
                        min=1.0,
                        max=100.0,
                        step=0.1,
                        tooltip="Guidance of the preview images. Without a negative prompt they are made at 1.",
                    ),
                ),
                *image_inputs("Encodes the image and makes the previews."),
                io.Conditioning.Input(
                    "target",
                    optional=True,
                    tooltip="The prompt of the edit. Only for the previews, never for the loss.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The empty prompt: guides the previews, starts the rows when init asks for it, and is what "
                    "the anchor holds them to.",
                ),
                *anchor_inputs(0.0),
            ],
            outputs=[
                Embedding.Output(display_name="embedding", tooltip="The learned rows at every saved step."),
                LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Image.Output(
                    display_name="previews",
                    tooltip="With a target: first the target alone, then for each saved step [source + rows] and "
                    "[target + 0.8 rows]. Without: [source + rows] for each saved step. Nothing runs behind it "
                    "without a VAE or with preview_steps 0.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        steps,
        learning_rate,
        tokens,
        save_every,
        init,
        seed,
        start_percent,
        end_percent,
        preview_steps,
        preview_cfg,
        latent=None,
        image=None,
        vae=None,
        mask=None,
        target=None,
        negative=None,
        anchor_weight=0.0,
        anchor=ANCHORS[0],
    ) -> io.NodeOutput:
        if init == EMPTY and negative is None:
            raise ValueError(
                "init is 'empty prompt' but nothing is connected to 'negative': connect the empty prompt there."
            )
        images = ImageSource(latent, image, vae, mask).encoded(model)
        embedding, losses = train_embedding(
            model,
            positive,
            images,
            hiper.HiPerSettings(tokens=tokens, learning_rate=learning_rate, seed=seed),
            Schedule(steps, save_every, start_percent, end_percent),
            TrainingPrompts(negative if init == EMPTY else None, target, held(negative, anchor_weight, anchor)),
            cls.hidden.unique_id,
        )
        loss = loss_map(losses)
        if vae is None or preview_steps == 0:
            return io.NodeOutput(embedding, loss, nothing())
        how = Previews(vae, negative, preview_steps, preview_cfg, seed)
        previews = preview_images(model, embedding, positive, target, tuple(images.latent.shape), how)
        return io.NodeOutput(embedding, loss, previews)


class LikenessApplyEmbedding(io.ComfyNode):
    """CONDITIONING + learned rows -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessApplyEmbedding",
            display_name="Apply Subject Embedding",
            category="likeness/embedding",
            description="Puts the learned subject into any prompt, in place of its last unused rows. Use it last, "
            "right before the sampler.",
            search_aliases=["hiper", "subject"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt of the new image, from the same text encoder."
                ),
                Embedding.Input("embedding", tooltip="A trained or loaded subject embedding."),
                io.Float.Input(
                    "scale",
                    default=hiper.SCALE,
                    min=0.0,
                    max=4.0,
                    step=0.01,
                    tooltip="1 is what was trained, 0.8 leaves more room for the edit (HiPer's own value), 0 "
                    "switches it off.",
                ),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="Which saved step to use; 0 takes the recommended one (the last one up to 1000).",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Connect the model to check that the embedding was trained on it. Nothing else is done "
                    "with it.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with the subject in it.")],
        )

    @classmethod
    def execute(cls, conditioning, embedding, scale, step, model=None) -> io.NodeOutput:
        if model is not None:
            check_base(embedding.header.get("base", {}), model)
        return io.NodeOutput(apply_embedding(conditioning, embedding.at(step), scale, embedding.windows))


NODES = [LikenessTrainEmbedding, LikenessApplyEmbedding]
