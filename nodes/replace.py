"""Replace the subject of an image and keep the rest (HiFi Tuner; prompt-to-prompt)."""

from comfy_api.latest import io

from ..core.attention.host.prompt_to_prompt import LearnedSubject, SubjectSwap, repeat_latent, replace_subject
from ..core.attention.host.swapped_prompt import check_texts
from ..core.attention.prompt_to_prompt import END_PERCENT
from ..core.session.texts import ascii_only
from . import inputs
from .node import Embedding, Node, checked, output, schema


class LikenessReplaceSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessReplaceSubject",
            display_name="Replace Subject (Prompt-to-Prompt)",
            category="likeness/reference",
            description="Replaces a word of the prompt that an image was inverted with, while the other words keep "
            "their attention maps. Sample without adding noise, with the euler sampler and the SIGMAS of the "
            "inversion: the first image is the reconstruction, the second the edit.",
            search_aliases=["prompt to prompt", "p2p", "hifi tuner", "word swap", "edit"],
            inputs=[
                io.Model.Input(
                    "model", lazy=True, tooltip="The model that the image was inverted with. It is not changed."
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.Latent.Input("latent", lazy=True, tooltip="The latent of one image, from Invert Image."),
                io.Conditioning.Input(
                    "negative", lazy=True, tooltip="From Null-Text, for reconstruction with guidance. Passed through."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a cat on the grass",
                    tooltip="The same prompt that the image was inverted with, at most 75 tokens of a CLIP encoder.",
                ),
                io.String.Input(
                    "word",
                    default="cat",
                    tooltip="The word or consecutive words to replace, as written in the prompt, where they occur "
                    "once.",
                ),
                io.String.Input("replacement", default="dog", tooltip="The new word or words."),
                inputs.fraction(
                    "end_percent",
                    END_PERCENT,
                    "Point in the sampling until which the image's attention is kept: 1 is to the end (HiFi Tuner), "
                    "0.8 is prompt-to-prompt's. Lower gives the new subject more freedom of shape.",
                ),
                inputs.scale(1.0, "Strength of the embedding: 1 is as trained, 0 leaves it out."),
                *inputs.advanced(
                    inputs.fraction(
                        "self_percent",
                        0.0,
                        "Point in the sampling until which self-attention is kept too (0.4 in prompt-to-prompt). This "
                        "keeps shapes, including the old subject's. Only in UNets (SD1.x to SDXL). 0 is off.",
                    ),
                    io.Boolean.Input(
                        "renormalise",
                        default=False,
                        tooltip="Renormalizes the mixed attention of each position to a sum of 1. The papers do not.",
                    ),
                    inputs.saved_step("Saved step of the embedding to use. 0 selects the recommended one."),
                    inputs.fraction(
                        "blend",
                        0.0,
                        "Keeps the source image wherever both the old and the new word get less than this fraction of "
                        "the highest attention (local blend, 0.3 in prompt-to-prompt). Needs the euler sampler. 0 is "
                        "off.",
                    ),
                ),
            ],
            optional=[
                Embedding.Input(
                    "embedding",
                    lazy=True,
                    tooltip="A trained subject to insert into the edit; its attention is not constrained. Use its "
                    "class as the replacement.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="White where the image may change: the subject, grown to where the new one will be. The "
                    "rest keeps the source image; with blend, a change must be allowed by both. Needs the euler "
                    "sampler.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt given to Invert Image, if it carries sizes (SDXL) or a ControlNet. They then "
                    "apply to both images.",
                ),
            ],
            outputs=[
                output(io.Model, "model", "The model to sample both images with."),
                output(io.Conditioning, "positive", "The original and the edited prompt, for the two images."),
                output(io.Conditioning, "negative", "The negative, passed through."),
                output(io.Latent, "latent", "The noise twice, for the image and for its edit."),
                output(Embedding, "embedding", "The embedding, passed through, to save it."),
            ],
        )

    @classmethod
    def check_lazy_status(cls, **given) -> list[str]:
        """The texts first: nothing is inverted or trained for a word that is not in the prompt."""
        schema = cls.define_schema()
        lazy = [widget.id for widget in schema.inputs if getattr(widget, "lazy", None)]
        missing = [name for name in lazy if given.get(name, name) is None]
        with ascii_only():
            there = checked(schema, {name: value for name, value in given.items() if name not in missing})
            check_texts(*(there[name] for name in ("clip", "prompt", "word", "replacement")))
        return missing

    @classmethod
    def execute(
        cls, model, clip, latent, negative, scale=1.0, step=0, embedding=None, positive=None, **swap
    ) -> io.NodeOutput:
        start = repeat_latent(latent)
        learned = None if embedding is None else LearnedSubject(embedding, scale, step)
        patched, both = replace_subject(model, clip, SubjectSwap(subject=learned, **swap), start, positive)
        return io.NodeOutput(patched, both, negative, start, embedding)
