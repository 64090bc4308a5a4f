"""Replace the subject of an image and leave the rest where it is (HiFi Tuner; prompt-to-prompt)."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.attention.host.prompt_to_prompt import LearnedSubject, SubjectSwap, repeat_latent, replace_subject
from ..core.attention.prompt_to_prompt import END_PERCENT
from .types import Embedding, advanced, fraction, schema


class LikenessReplaceSubject(io.ComfyNode):
    """MODEL + an inverted image + a word swap -> MODEL, prompts and noise for the image and its edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessReplaceSubject",
            display_name="Replace Subject (Prompt-to-Prompt)",
            category="likeness/reference",
            description="Exchanges a word of the prompt that an image was inverted with, while everything else looks "
            "where it looked in the image. Sample without adding noise, with the euler sampler and the SIGMAS of the "
            "inversion: the first image is the reconstruction, the second the edit.",
            search_aliases=["prompt to prompt", "p2p", "hifi tuner", "word swap", "edit"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the image was inverted with. It is not changed."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.Latent.Input("latent", tooltip="The noise from Invert Image, of one image."),
                io.Conditioning.Input(
                    "negative", tooltip="From Null-Text, so that the image comes back with guidance. Passed on."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a cat on the grass",
                    tooltip="The very prompt that the image was inverted with; at most 75 tokens.",
                ),
                io.String.Input(
                    "word",
                    default="cat",
                    tooltip="The word, or words in a row, that go: as they stand in the prompt, once.",
                ),
                io.String.Input("replacement", default="dog", tooltip="What takes their place: one or more words."),
                fraction(
                    "end_percent",
                    END_PERCENT,
                    "Until which part of the sampling the image's attention is kept: 1 is to the end (HiFi "
                    "Tuner), 0.8 prompt-to-prompt's. Earlier gives the new subject more freedom of shape.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.01,
                    tooltip="Strength of the embedding: 1 is what was trained, 0 leaves it out.",
                ),
                *advanced(
                    fraction(
                        "self_percent",
                        0.0,
                        "Until which part of the sampling self-attention is taken over too "
                        "(prompt-to-prompt, 0.4 there): keeps shapes, also the old subject's. 0 is off.",
                    ),
                    io.Boolean.Input(
                        "renormalise",
                        default=False,
                        tooltip="Bring the mixed attention of each place back to a sum of 1. The papers do not.",
                    ),
                    io.Int.Input(
                        "step",
                        default=0,
                        min=0,
                        max=100_000,
                        tooltip="Which saved step of the embedding to use; 0 takes the recommended one.",
                    ),
                    fraction(
                        "blend",
                        0.0,
                        "Keep the image itself wherever the word, old or new, gets less than this share of "
                        "the most attention (prompt-to-prompt's local blend, 0.3 there). Needs the euler sampler. 0 is "
                        "off.",
                    ),
                ),
                Embedding.Input(
                    "embedding",
                    optional=True,
                    tooltip="A trained subject to put into the edit; its rows look where they like. Replace the word "
                    "by its class.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the image may change: the subject, grown to where the new one will be. "
                    "Elsewhere the image itself is kept; with blend too, where both allow it. Needs the euler "
                    "sampler.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt as Invert Image got it, when something is on it: sizes (SDXL), a ControlNet. "
                    "They then hold for both images.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Sample both images with this one."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt and the edited prompt, for the two images."
                ),
                io.Conditioning.Output(display_name="negative", tooltip="As it came, for the sampler."),
                io.Latent.Output(display_name="latent", tooltip="The noise twice: for the image and for its edit."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        latent,
        negative,
        prompt,
        word,
        replacement,
        end_percent,
        scale=1.0,
        self_percent=0.0,
        renormalise=False,
        step=0,
        blend=0.0,
        embedding=None,
        mask=None,
        positive=None,
    ) -> io.NodeOutput:
        start = repeat_latent(latent)
        learned = None if embedding is None else LearnedSubject(embedding, scale, step)
        wanted = SubjectSwap(
            prompt, word, replacement, learned, end_percent, self_percent, renormalise, blend, mask
        )  # fmt: skip
        patched, both = replace_subject(model, clip, wanted, positive)
        return io.NodeOutput(patched, both, negative, start)


NODES = [LikenessReplaceSubject]
