"""Guide an edit with models fine-tuned on one image (SINE), as a MODEL for any sampler or as a GUIDER."""

from typing import Any

from comfy_api.latest import io

from ..core.sine.guidance import BASE_WEIGHT, CFG, END_PERCENT, LAST_TIMESTEP
from ..core.sine.host.guidance import guider, subject_model, with_guidance
from ..core.sine.host.personalization import OMEGA, with_personalization
from . import inputs
from .node import Node, Subjects, output, schema


def _window() -> list[io.Input]:
    return [
        inputs.fraction(
            "end_percent",
            END_PERCENT,
            "Point in the sampling at which the fine-tuned model stops guiding: 0.6 is K = 400. Later keeps more of "
            "the image's details.",
        ),
        *inputs.advanced(
            inputs.fraction(
                "start_percent",
                0.0,
                "Point in the sampling at which the fine-tuned model starts guiding: 0 is pure noise, as in the paper.",
            ),
            inputs.number(
                "k_timestep",
                -1,
                (-1, LAST_TIMESTEP + 1),
                "K as a training timestep, as in the paper: 0 guides to the end, 1000 never. It overrides "
                "end_percent; -1 uses end_percent.",
            ),
        ),
    ]


def _guidance(*cfg: io.Input) -> list[io.Input]:
    """All that follows the model and the prompts; cfg: that of the guider."""
    return [
        io.Model.Input(
            "tuned",
            tooltip="The model that was fine-tuned on the image: from another loader, or the same model with a LoRA.",
        ),
        io.Conditioning.Input(
            "tuned_positive",
            tooltip="The fine-tuned model's training prompt, such as 'photo of a sks dog', from its own CLIP.",
        ),
        *cfg,
        inputs.fraction(
            "base_weight",
            BASE_WEIGHT,
            "v: the base model's weight in the guided prediction; the fine-tuned model gets 1 - v. Higher follows the "
            "edit prompt more, lower keeps more of the image. 0.5 to 0.8 is usual.",
        ),
        *_window(),
        *inputs.advanced(
            io.Boolean.Input(
                "allow_over_one",
                default=False,
                tooltip="Allows the weights of the fine-tuned models to add up to more than 1, which makes the base "
                "model's weight negative.",
            )
        ),
        Subjects.Input(
            "subjects", optional=True, tooltip="More fine-tuned models from Subject Model, such as a style."
        ),
    ]


def _guided(model, tuned, tuned_positive, base_weight, allow_over_one=False, subjects=None, **window) -> Any:
    first = subject_model(tuned, tuned_positive, 1 - base_weight, **window)
    return with_guidance(model, [first, *(subjects or [])], allow_over_one)


class LikenessSubjectModel(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSubjectModel",
            display_name="Subject Model",
            category="likeness/guidance",
            description="Adds another fine-tuned model to a guidance (SINE), such as a style in addition to the "
            "content. The base model keeps 1 minus the sum of all weights.",
            search_aliases=["sine", "style transfer"],
            inputs=[
                io.Model.Input("model", tooltip="The fine-tuned model."),
                io.Conditioning.Input("positive", tooltip="The prompt it was trained with, from its own CLIP."),
                inputs.fraction(
                    "weight",
                    1 - BASE_WEIGHT,
                    "Weight of this model in the guided prediction (beta). SINE's style transfer: content 0.4, style "
                    "0.5.",
                ),
                *_window(),
            ],
            optional=[Subjects.Input("subjects", tooltip="Fine-tuned models to add this one to.")],
            outputs=[output(Subjects, "subjects", "The fine-tuned models, for a guidance node.")],
        )

    @classmethod
    def execute(cls, model, positive, weight, subjects=None, **window) -> io.NodeOutput:
        return io.NodeOutput([*(subjects or []), subject_model(model, positive, weight, **window)])


class LikenessGuidance(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessGuidance",
            display_name="Subject Guidance (SINE)",
            category="likeness/guidance",
            description="Guides the base model with a model fine-tuned on one image while the layout is decided "
            "(SINE): the result follows the edit prompt and keeps the image. For KSampler and any guider; the paper "
            f"uses cfg {CFG}.",
            search_aliases=["sine", "edit", "single image", "model merge"],
            inputs=[
                io.Model.Input("model", tooltip="The base model. It receives the edit prompt and the negative prompt."),
                *_guidance(),
            ],
            outputs=[output(io.Model, "model", "The guided model. Sample it with the edit prompt.")],
        )

    @classmethod
    def execute(cls, **guidance) -> io.NodeOutput:
        return io.NodeOutput(_guided(**guidance))


class LikenessGuider(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessGuider",
            display_name="Subject Guider",
            category="likeness/guidance",
            description="Subject Guidance with prompts and cfg in one node, for SamplerCustomAdvanced. The images are "
            "bit-identical.",
            search_aliases=["sine", "edit", "single image"],
            inputs=[
                io.Model.Input("model", tooltip="The base model."),
                io.Conditioning.Input("positive", tooltip="The edit prompt, from the base model's CLIP."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, usually empty, from the same CLIP."),
                *_guidance(
                    inputs.cfg(
                        CFG,
                        "Guidance scale of the guided prediction over the negative prompt's, usually 7.5 to 10.",
                        0.0,
                    )
                ),
            ],
            outputs=[output(io.Guider, "guider", "The guider, for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, positive, negative, cfg, **guidance) -> io.NodeOutput:
        return io.NodeOutput(guider(_guided(**guidance), positive, negative, cfg))


class LikenessPersonalizationGuidance(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessPersonalizationGuidance",
            display_name="Personalization Guidance",
            category="likeness/guidance",
            description="Guides a fine-tuned model, or a model with a LoRA, away from what the base model would make "
            "of no prompt: more of the subject and of the prompt, at the cost of plain sampling (Park et al. 2025).",
            search_aliases=["lora strength", "autoguidance", "weak model", "cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the fine-tuning."),
                io.Model.Input("tuned", tooltip="The fine-tuned model: from another loader, or the model with a LoRA."),
                inputs.fraction(
                    "weak",
                    OMEGA,
                    "omega: how much of the fine-tuning the negative prediction keeps. 0 is the base model, 1 is plain "
                    "guidance. Lower shows more of the subject. Between 0 and 1 the fine-tuning must be a LoRA or "
                    "weights on the same loaded model.",
                ),
            ],
            outputs=[
                output(
                    io.Model,
                    "model",
                    "The fine-tuned model, guided. Sample it with your prompt, an empty negative prompt and a "
                    "cfg above 1.",
                )
            ],
        )

    @classmethod
    def execute(cls, model, tuned, weak=OMEGA) -> io.NodeOutput:
        return io.NodeOutput(with_personalization(model, tuned, weak))
