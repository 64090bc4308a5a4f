"""Train, refine, apply, save and load subject embeddings (HiPer, HiFi Tuner)."""

from comfy_api.latest import io

from ..core.embedding import hifi_tuner, hiper
from ..core.embedding.artifact import load_embedding, save_embedding
from ..core.embedding.host import train
from ..core.embedding.host.refine import refine_embedding
from ..core.embedding.presets import EMPTY, SOURCE, presets_for
from ..core.fit.presets import AS_SET, apply_preset
from ..core.prompt.conditioning import apply_embedding
from ..core.session import folders
from ..core.session.fingerprint import check_base
from ..core.session.images import ImageSource
from ..core.session.sampling import kind_of
from . import inputs
from .node import Embedding, LossMap, Node, SavingNode, build, output, schema


def anchor_inputs() -> list[io.Input]:
    """HiFi Tuner's regularizer, by default none."""
    return inputs.advanced(
        inputs.number(
            "anchor_weight",
            0.0,
            (0.0, 1.0, 0.001, 1e-6),
            "Weight of the regularizer that keeps the learned token embeddings close to those of the empty prompt "
            "connected to 'negative' (HiFi Tuner; usually 0.01), so that the prompt is still followed. 0 turns it "
            "off, as in HiPer.",
        ),
        inputs.choice(
            "anchor",
            train.ANCHORS,
            "How the regularizer is applied: as a term of the loss, as in the paper, or decoupled from the gradient, "
            "so that Adam does not rescale it. The decoupled form needs a larger weight (0.1 to 1).",
        ),
    )


def image_inputs(vae: str) -> list[io.Input]:
    """The inputs for the training images; vae: the tooltip of that input."""
    return [
        io.Latent.Input("latent", tooltip="The training image(s), encoded. Use this or image and VAE."),
        io.Image.Input("image", tooltip="The training image(s), at the model's size. Needs the VAE."),
        io.Vae.Input("vae", tooltip=vae),
        io.Mask.Input("mask", tooltip="White on the subject. The rest of the image is not learned."),
    ]


class LikenessTrainEmbedding(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessTrainEmbedding",
            display_name="Train Subject Embedding (HiPer)",
            category="likeness/embedding",
            description="Learns a subject from one image as a few token embeddings at the end of the prompt (HiPer, "
            "similar to textual inversion). The model's weights do not change.",
            search_aliases=["hiper", "textual inversion", "personalize", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train the embedding for. It is not changed."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The source prompt: a plain description of the image, such as 'a standing cat'. It must "
                    "leave at least as many unused tokens as 'tokens' asks for.",
                ),
                inputs.count(
                    "steps",
                    hiper.STEPS,
                    100_000,
                    "Number of updates, usually 300 to 1000; many more reduce editability. Raise it later to resume "
                    "the run. A lower value returns that step if it was saved, else the longer run with a warning.",
                ),
                inputs.token_rate(
                    hiper.LEARNING_RATE,
                    "Adam's learning rate. 0.005 for SD1.x, 0.002 for SDXL; try 0.001 to 0.01, with fewer steps up to "
                    "0.04.",
                ),
                inputs.count(
                    "tokens",
                    hiper.TOKENS,
                    75,
                    "Number of token embeddings that hold the subject, 3 to 8. More keep more of the image "
                    "and leave less room for the edit.",
                ),
                inputs.count(
                    "save_every",
                    hiper.SAVE_EVERY,
                    100_000,
                    "Interval in steps at which the embedding is saved, to choose the best one later.",
                ),
                inputs.choice(
                    "init",
                    [SOURCE, EMPTY],
                    "Initial values of the embedding: the source prompt's own unused tokens (HiPer), or those of the "
                    "empty prompt connected to 'negative' (HiFi Tuner).",
                ),
                inputs.seed(
                    "Seed of the timesteps, the noise and the previews. The same seed gives bit-identical results on "
                    "a CPU; on a GPU, up to rounding."
                ),
                *inputs.advanced(
                    inputs.number(
                        "start_percent",
                        0.0,
                        (0.0, 1.0, 0.01),
                        "Start of the part of the denoising process to train on. 0 is pure noise.",
                    ),
                    inputs.number(
                        "end_percent",
                        1.0,
                        (0.0, 1.0, 0.01),
                        "End of the part of the denoising process to train on. 1 is the finished image.",
                    ),
                    inputs.number(
                        "preview_steps",
                        20,
                        (0, 1000),
                        "Sampling steps of each preview image. 0 makes no previews. Needs the VAE.",
                    ),
                    inputs.number(
                        "preview_cfg",
                        7.5,
                        (1.0, 100.0, 0.1),
                        "Guidance scale of the preview images. Without a negative prompt it is 1.",
                    ),
                ),
            ],
            optional=[
                *image_inputs("Encodes the image and decodes the previews."),
                io.Conditioning.Input(
                    "target",
                    tooltip="The edit prompt. It is used for previews only, never for the loss. While the training "
                    "runs, the node shows it with the subject as learned so far.",
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The empty prompt. It guides the previews, initializes the embedding if init asks for it, "
                    "and is what the regularizer pulls the embedding towards.",
                ),
                *anchor_inputs(),
                inputs.preset(
                    "fast: 300 steps at a learning rate of 0.04 on the middle of the denoising (flow models: 0.03 of "
                    "the size of the prompt's numbers, on all of it), at least as alike as 1000 published ones in the "
                    "toyworld. published: HiPer's own."
                ),
            ],
            outputs=[
                output(Embedding, "embedding", "The learned embedding at every saved step."),
                output(LossMap, "loss", "The loss of every step, for Plot Loss Graph."),
                output(
                    io.Image,
                    "previews",
                    "As many as cost at most 4 % of the training, at least one. With a target the last is [target + "
                    "0.8 embedding] of the last step, before it [source + embedding]; longer trainings show the target "
                    "alone first, and two earlier steps. Without a target: [source + embedding] only. "
                    "Nodes connected here do not run without a VAE or with preview_steps 0.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, positive, preview_steps, preset=AS_SET, **more) -> io.NodeOutput:
        more = apply_preset(presets_for(positive[0][0]), preset, kind_of(model), more)
        kinds = ImageSource, hiper.HiPerSettings, train.Schedule, train.TrainingPrompts
        source, settings, schedule, prompts = build(more, *kinds)
        images = source.encoded(model)
        embedding, losses = train.train_embedding(model, positive, images, settings, schedule, prompts)
        if source.vae is None or preview_steps == 0:
            return io.NodeOutput(embedding, losses, None)
        how = train.Previews(source.vae, prompts.negative, preview_steps, prompts.preview_cfg, settings.seed)
        previews = train.preview_images(model, embedding, positive, prompts.target, tuple(images.latent.shape), how)
        return io.NodeOutput(embedding, losses, previews)


class LikenessRefineEmbedding(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessRefineEmbedding",
            display_name="Refine Subject Embedding (HiFi Tuner)",
            category="likeness/embedding",
            description="Trains an embedding further for each denoising step separately, starting from the noisiest "
            "(HiFi Tuner), so that early steps hold shape and late steps hold detail.",
            search_aliases=["hifi tuner", "step-wise", "textual inversion", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the embedding was trained on. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The source prompt that the embedding was trained with."),
                Embedding.Input("embedding", tooltip="From Train Subject Embedding or Load Subject Embedding."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels of the sampling, from BasicScheduler. Separate token embeddings are learned "
                    "for each of its steps; other schedules use those of the nearest level.",
                ),
                inputs.inner_steps(hifi_tuner.INNER_STEPS, "Updates per denoising step. The paper uses 10."),
                inputs.token_rate(hifi_tuner.LEARNING_RATE, "Adam's learning rate, as in the embedding's training."),
                inputs.saved_step("Saved step of the embedding to start from. 0 selects the recommended one."),
                inputs.seed("Seed of the image and the noise of each update."),
            ],
            optional=[
                *image_inputs("Encodes the image."),
                io.Conditioning.Input(
                    "negative", tooltip="The empty prompt, which the regularizer pulls the embedding towards."
                ),
                *anchor_inputs(),
            ],
            outputs=[
                output(Embedding, "embedding", "The step-wise embedding, for Apply Subject Embedding with scale 1."),
                output(LossMap, "loss", "The loss of every update, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def execute(cls, model, positive, embedding, sigmas, step, **more) -> io.NodeOutput:
        source, settings, anchor = build(more, ImageSource, hifi_tuner.StepWiseSettings, train.RegularizerOptions)
        images = source.encoded(model)
        return io.NodeOutput(*refine_embedding(model, positive, images, embedding, sigmas, settings, anchor, step))


class LikenessApplyEmbedding(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessApplyEmbedding",
            display_name="Apply Subject Embedding",
            category="likeness/embedding",
            description="Adds the learned subject to any prompt, in place of its last unused token embeddings. Use it "
            "last, right before the sampler.",
            search_aliases=["hiper", "subject"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="The prompt of the new image, encoded with the same text encoder."
                ),
                Embedding.Input("embedding", tooltip="A trained or loaded subject embedding."),
                inputs.scale(
                    hiper.SCALE,
                    "Strength of the embedding. 1 is as trained, 0.8 (HiPer's value) leaves more room for the edit, 0 "
                    "turns it off.",
                ),
                inputs.saved_step("Saved step to use. 0 selects the recommended one (the last one up to 1000)."),
            ],
            optional=[
                io.Model.Input(
                    "model",
                    tooltip="Connect the model to check that the embedding was trained on it. It has no other effect.",
                ),
            ],
            outputs=[output(io.Conditioning, "conditioning", "The prompt with the subject in it.")],
        )

    @classmethod
    def execute(cls, conditioning, embedding, scale, step, model=None) -> io.NodeOutput:
        if model is not None:
            check_base(embedding.header.get("base", {}), model)
        rows = embedding.at(step)
        return io.NodeOutput(apply_embedding(conditioning, rows, scale, embedding.windows, embedding.placement))


class LikenessSaveEmbedding(SavingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSaveEmbedding",
            display_name="Save Subject Embedding",
            category="likeness/embedding",
            description="Saves the learned subject as a small safetensors file in models/likeness_embeddings.",
            search_aliases=["hiper", "hifi tuner", "textual inversion", "save embedding"],
            inputs=[
                Embedding.Input("embedding", tooltip="A trained subject embedding."),
                inputs.prefix("likeness/subject"),
            ],
            outputs=[
                output(Embedding, "embedding", "The embedding, passed through."),
                output(io.String, "name", "The name under which Load Subject Embedding lists the file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, embedding, filename_prefix) -> io.NodeOutput:
        return cls.saved(folders.EMBEDDINGS, embedding, filename_prefix, save_embedding, embedding.describe())


class LikenessLoadEmbedding(Node, files={"name": folders.EMBEDDINGS}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadEmbedding",
            display_name="Load Subject Embedding",
            category="likeness/embedding",
            description="Loads a learned subject from models/likeness_embeddings: a .safetensors file of this pack, "
            "or a .pt file of HiPer's reference code.",
            search_aliases=["hiper", "hifi tuner", "textual inversion", "load embedding"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.EMBEDDINGS),
                    tooltip="A file in models/likeness_embeddings. Press R to refresh the list after saving one.",
                )
            ],
            outputs=[
                output(Embedding, "embedding", "The loaded subject embedding."),
                output(io.String, "info", "Method, number of tokens, base model, saved steps and loss."),
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        embedding = load_embedding(folders.resolve(folders.EMBEDDINGS, name))
        return io.NodeOutput(embedding, embedding.describe())
