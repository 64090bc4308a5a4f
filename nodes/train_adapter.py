"""Train EZIGen's adapter on a folder of images of subjects."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.ezigen.host import train as host
from ..core.ezigen.subject_pairs import PairFolder
from ..core.ezigen.train import DROP, LEARNING_RATE, MAX_SUBJECTS, TrainingSettings
from ..core.session import folders
from ..core.session.outputs import loss_map
from .types import Adapter, LossMap, advanced, schema, seed_input


class LikenessTrainAdapter(io.ComfyNode):
    """MODEL + CLIP + VAE + a folder of images -> LIKENESS_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessTrainAdapter",
            display_name="Train Subject Adapter (EZIGen)",
            category="likeness/adapter",
            description="Trains EZIGen's adapter on a folder of images of many subjects, so that it reads subjects "
            "of that kind better. The model itself stays as it is. For large sets there is a command-line trainer.",
            search_aliases=["ezigen", "subject adapter", "training", "fine-tune adapter"],
            inputs=[*_inputs(), *_advanced_inputs(), _start()],
            outputs=[
                Adapter.Output(
                    display_name="adapter", tooltip="For Apply Subject Adapter, and Extract Subject Adapter to save it."
                ),
                LossMap.Output(display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."),
                io.String.Output(
                    display_name="report",
                    tooltip="What of the folder was used and what was left out, and the error with the subject's "
                    "images beside that without.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **_others) -> str:
        return folders.image_folder_state(folder)

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        folder,
        size,
        steps,
        batch,
        learning_rate,
        seed,
        drop=DROP,
        max_subjects=MAX_SUBJECTS,
        checkpointing=False,
        adapter=None,
    ) -> io.NodeOutput:
        pairs = PairFolder(folders.resolve_image_folder(folder), size, max_subjects)
        trained, losses, report = host.train_adapter(
            host.TrainingModels(model, clip, vae, adapter),
            pairs,
            host.AdapterPlan(size, steps, max_subjects, checkpointing),
            TrainingSettings(seed, batch, learning_rate, drop),
            cls.hidden.unique_id,
        )
        return io.NodeOutput(trained, loss_map(losses), report)


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model", tooltip="SD2.1-base (512), which the published adapter is for, or an SD1.x model. Not changed."
        ),
        io.Clip.Input("clip", tooltip="Encodes the captions and the class nouns."),
        io.Vae.Input("vae", tooltip="Encodes the images."),
        io.Combo.Input(
            "folder",
            options=folders.image_folders(),
            tooltip="A folder in ComfyUI's input folder with a folder for each subject: images, each with <name>.txt "
            "(its caption) and <name>.mask.png (white on the subject). Press R to refresh the list.",
        ),
        io.Int.Input(
            "size",
            default=512,
            min=64,
            max=2048,
            step=8,
            tooltip="Side of the squares that images and subjects are brought to: what the model was made for.",
        ),
        io.Int.Input(
            "steps",
            default=2000,
            min=1,
            max=10_000_000,
            tooltip="Number of updates. From the published adapter a few thousand; the published one itself took "
            "200,000. More later goes on where this run ended.",
        ),
        io.Int.Input(
            "batch",
            default=1,
            min=1,
            max=256,
            tooltip="Images learned from in one update. 1 is published; more make the loss quieter and take as many "
            "times the memory.",
        ),
        io.Float.Input(
            "learning_rate",
            default=LEARNING_RATE,
            min=1e-8,
            max=1.0,
            step=1e-5,
            round=1e-8,
            tooltip="AdamW's learning rate: 0.0001 is published; 0.00001 to 0.00005 when going on from an adapter.",
        ),
        seed_input("Decides which images come when, timesteps and noise."),
    ]


def _advanced_inputs() -> list[io.Input]:
    inputs = [
        io.Float.Input(
            "drop",
            default=DROP,
            min=0.0,
            max=1.0,
            step=0.05,
            round=0.001,
            tooltip="In which part of the samples the subject is not shown. 0.1 is what the authors meant; 0.8 is what "
            "their released code does, by a comparison the wrong way round.",
        ),
        io.Int.Input(
            "max_subjects",
            default=MAX_SUBJECTS,
            min=1,
            max=MAX_SUBJECTS,
            tooltip="Up to so many other images of a subject are shown beside each image. 4 is published; 1 costs "
            "less, and is enough when you will only ever show one.",
        ),
        io.Boolean.Input(
            "checkpointing",
            default=False,
            tooltip="Compute parts of the network twice instead of keeping them: less VRAM, more time, the same "
            "result.",
        ),
    ]
    return advanced(*inputs)


def _start() -> io.Input:
    return Adapter.Input(
        "adapter",
        optional=True,
        tooltip="An adapter to go on from. Without one it starts as published, from copies of the model's "
        "self-attentions, and needs the long training.",
    )


NODES = [LikenessTrainAdapter]
