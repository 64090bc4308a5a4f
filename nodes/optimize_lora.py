"""Optimize a LoRA for the similarity of its images to a subject (SISO)."""

from typing import get_args

from comfy_api.latest import io

from ..core.fit.presets import AS_SET, apply_preset
from ..core.inversion.host.renoise import replay_of
from ..core.lora.host.apply import apply_lora
from ..core.session.sampling import kind_of
from ..core.siso import siso
from ..core.siso.host import optimize_lora as host
from ..core.siso.host.background import background
from ..core.siso.presets import NEW, SAME, SISO
from . import inputs
from .node import LoraModel, LossMap, Node, Similarity, build, output, schema


class LikenessOptimizeLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessOptimizeLora",
            display_name="Optimize LoRA (SISO)",
            category="likeness/similarity",
            description="Generates an image again and again from the same noise, and after each one updates a LoRA so "
            "that the next is more similar to the subject (SISO). Use a plain prompt such as 'a photo of a dog'; the "
            "LoRA also works with other prompts and more steps.",
            search_aliases=["siso", "image similarity", "single image", "lora training", "reward"],
            inputs=[*_inputs(), *_advanced_inputs()],
            optional=_optional_inputs(),
            outputs=[
                output(io.Model, "model", "The model with the LoRA."),
                output(io.Clip, "clip", "The text encoder with the LoRA, if 'clip' is connected."),
                output(LoraModel, "lora", "The LoRA, for Save Fine-Tune and the stock LoRA nodes."),
                output(io.Image, "best", "The image most similar to the subject."),
                output(io.Image, "images", "The images of all iterations."),
                output(LossMap, "loss", "The loss of every iteration, for Plot Loss Graph."),
                output(io.String, "report", "The best iteration and its similarities."),
            ],
        )

    @classmethod
    def execute(
        cls,
        similarity,
        latent,
        image=None,
        mask=None,
        background_weight=siso.BACKGROUND,
        noise=SAME,
        preset=AS_SET,
        **more,
    ) -> io.NodeOutput:
        more = apply_preset(SISO, preset, kind_of(more["model"]), {**more, "noise": noise})
        kinds = host.Generator, host.Sampling, host.SisoPlan, siso.SisoSettings
        start = {"latent": latent["samples"], "replay": replay_of(latent), "new_noise": more.pop("noise") == NEW}
        generator, sampling, plan, settings = build({**more, **start}, *kinds)
        rest = background(image, mask, background_weight)
        job = host.SisoJob(generator, similarity, sampling, plan, settings, rest)
        found = host.optimize_lora(job)
        tuned, encoder = apply_lora(found.lora, generator.model, generator.clip, 1.0)
        return io.NodeOutput(tuned, encoder, found.lora, found.image, found.images, found.losses, found.report())


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to optimize the LoRA for. It is not changed."),
        io.Vae.Input("vae", tooltip="Decodes every image, with gradients."),
        io.Conditioning.Input("positive", tooltip="A plain prompt such as 'a photo of a dog'."),
        Similarity.Input("similarity", tooltip="The similarity to optimize, from Likeness To Images."),
        io.Latent.Input(
            "latent", tooltip="The image size (Empty Latent Image), or for editing the noise of an inverted image."
        ),
        io.Sigmas.Input(
            "sigmas", tooltip="Noise levels of the sampling: one step for turbo models, 20 or more for others."
        ),
        inputs.count(
            "iterations",
            siso.ITERATIONS,
            10_000,
            "Maximum number of images. Raise it later to continue; a lower value returns the run as stored.",
        ),
        inputs.number(
            "learning_rate",
            2e-4,
            (1e-7, 1.0, 1e-5, 1e-8),
            "AdamW's learning rate. SISO uses 0.0002 for SDXL-turbo and FLUX.1-schnell, 0.0008 for Sana. Set it to 1 "
            "for Prodigy.",
        ),
        inputs.cfg(
            1.0, "Guidance scale during optimization: 1 for turbo models. Above 1 it needs the negative prompt."
        ),
        inputs.count(
            "grad_steps",
            1,
            1000,
            "Number of last sampling steps with gradients, usually 1 to 3. More need more memory.",
        ),
        inputs.seed("Seed of the noise, which is the same in every iteration, and of the LoRA initialization."),
    ]


def _advanced_inputs() -> list[io.Input]:
    def number(name: str, default: float, most: float, tooltip: str) -> io.Input:
        return inputs.number(name, default, (0.0, most, default / 10, 1e-8), tooltip)

    return inputs.advanced(
        inputs.count("rank", siso.RANK, 512, "Rank of the LoRA."),
        number("weight_decay", 1e-2, 1.0, "Weight decay of the optimizer. 0.0001 for FLUX and Sana."),
        number(
            "text_rate",
            2e-4,
            1.0,
            "Learning rate of the text encoder, if 'clip' is connected. 0.000005 for FLUX. Prodigy uses learning_rate.",
        ),
        number("text_decay", 1e-2, 1.0, "Weight decay of the text encoder. 0.001 for FLUX."),
        number("threshold", siso.THRESHOLD, 100.0, "Decrease of the loss, in percent, that counts as an improvement."),
        inputs.number(
            "patience",
            siso.PATIENCE,
            (0, 10_000),
            "Stops after this many iterations without an improvement; 0 never stops early. A higher value "
            "resumes a stopped run.",
        ),
        inputs.choice(
            "keep",
            get_args(siso.Keep),
            "Returns the LoRA of the best image, or that of the last iteration, as the reference code does. Both are "
            "stored.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=False,
            tooltip="Gradient checkpointing of the model, the decoder and the vision models: much less memory, about "
            "a third more time, the same result.",
        ),
        number("background_weight", siso.BACKGROUND, 1000.0, "Weight of the background loss. Needs a mask."),
    )


def _optional_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("negative", tooltip="The negative prompt, for cfg above 1."),
        io.Clip.Input(
            "clip",
            tooltip="Connect it to optimize the CLIP text encoders too, as SISO does for SDXL-turbo and FLUX. It "
            "encodes 'prompt', which must match 'positive'.",
        ),
        io.String.Input(
            "prompt",
            default="",
            tooltip="The text that 'positive' was encoded from. It is stored in the LoRA file and has no other effect "
            "without 'clip'.",
        ),
        io.Image.Input("image", tooltip="For editing: the image whose background is kept."),
        io.Mask.Input("mask", tooltip="White where the image may change. It must not be empty."),
        *inputs.advanced(
            inputs.choice(
                "optimizer",
                get_args(siso.OptimizerName),
                "SISO uses AdamW. Prodigy finds the step size itself, with learning_rate 1; it needs the prodigyopt "
                "package.",
            ),
            inputs.layers("those of the attention (of FLUX.1 also some others, as in the authors' script)"),
            inputs.choice(
                "noise",
                (SAME, NEW),
                "same: every iteration has the noise of the seed, as SISO. new: each has another one, so that the LoRA "
                "also works from other seeds; all iterations run, and the last one's LoRA is returned.",
            ),
        ),
        inputs.preset(
            "fast: 25 iterations at a learning rate of 0.0003, from the same noise, as alike as 50 at two thirds of "
            "that rate in the toyworld; for one step. published: the authors' for SDXL-turbo or, on flow models, "
            "FLUX.1-schnell."
        ),
    ]
