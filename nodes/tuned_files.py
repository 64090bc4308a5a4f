"""Save and load fine-tuned weights."""

from comfy_api.latest import io

from ..core.lora.artifact import FineTunedWeights, save_fine_tune
from ..core.lora.host.apply import encode_prompt
from ..core.session import folders
from ..core.session.fingerprint import check_base
from ..core.sine.artifact import load_fine_tune, summary
from ..core.sine.host.position_map import apply_fine_tune
from . import inputs
from .node import LoraModel, Node, SavingNode, output, schema


class LikenessSaveTuned(SavingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessSaveTuned",
            display_name="Save Fine-Tune",
            category="likeness/fine_tune",
            description="Saves the result of Fine-Tune On Image or Optimize LoRA to models/loras, with its prompt and "
            "position map. The stock Load LoRA also reads the file, without the map.",
            search_aliases=["sine", "siso", "save lora"],
            inputs=[
                LoraModel.Input("lora", tooltip="The output of Fine-Tune On Image or Optimize LoRA."),
                inputs.prefix("likeness/tuned"),
            ],
            outputs=[
                output(LoraModel, "lora", "The fine-tune, passed through."),
                output(io.String, "name", "The name under which Load Fine-Tune lists the file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora, filename_prefix) -> io.NodeOutput:
        if not isinstance(lora, FineTunedWeights):
            raise ValueError(
                "This LORA_MODEL was not made by Fine-Tune On Image or Optimize LoRA, so nothing is known of its "
                "prompt and base: save it with the stock Save LoRA node."
            )
        return cls.saved(folders.LORAS, lora, filename_prefix, save_fine_tune, summary(lora))


class LikenessLoadTuned(Node, files={"name": folders.LORAS}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadTuned",
            display_name="Load Fine-Tune",
            category="likeness/fine_tune",
            description="Loads a saved fine-tune: the weights, the position map they need and the training prompt.",
            search_aliases=["sine", "siso", "load lora", "position map"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.LORAS),
                    tooltip="A file in models/loras. Press R to refresh the list after saving one.",
                ),
                io.Model.Input("model", tooltip="The base model of the fine-tune. It is not changed."),
                inputs.number(
                    "strength",
                    1.0,
                    (-10.0, 10.0, 0.05),
                    "Strength of the fine-tune. 1 is as trained; 0 returns the model as it is, without the "
                    "position map.",
                ),
            ],
            optional=[
                io.Clip.Input(
                    "clip", tooltip="The text encoder. It gets its own trained weights and encodes the training prompt."
                ),
            ],
            outputs=[
                output(io.Model, "model", "The fine-tuned model, with its position map."),
                output(io.Clip, "clip", "The fine-tuned text encoder. Nodes connected here do not run without 'clip'."),
                output(io.String, "prompt", "The training prompt."),
                output(
                    io.Conditioning,
                    "positive",
                    "The training prompt, encoded by the fine-tuned text encoder, for Subject Guidance. Nodes "
                    "connected here do not run without 'clip', or for a file of the stock Save LoRA, which has no "
                    "prompt.",
                ),
                output(io.String, "info", "Method, base model, prompt, position map, settings and loss."),
            ],
        )

    @classmethod
    def execute(cls, name, model, strength, clip=None) -> io.NodeOutput:
        tuned = load_fine_tune(folders.resolve(folders.LORAS, name))
        check_base(tuned.header.get("base", {}), model)
        tuned_model, tuned_clip = apply_fine_tune(tuned, model, clip, strength)
        positive = encode_prompt(tuned_clip, tuned.prompt) if tuned_clip is not None and tuned.prompt else None
        return io.NodeOutput(tuned_model, tuned_clip, tuned.prompt, positive, summary(tuned))
