"""Train EZIGen's adapter on a folder of subject images."""

from comfy_api.latest import io

from ..core.ezigen.host import train as host
from ..core.ezigen.subject_pairs import PairFolder
from ..core.ezigen.train import DROP, LEARNING_RATE, MAX_SUBJECTS, TrainingSettings
from ..core.session import folders
from . import inputs
from .node import Adapter, LossMap, Node, output, schema


class LikenessTrainAdapter(Node, files={"folder": None}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessTrainAdapter",
            display_name="Train Subject Adapter (EZIGen)",
            category="likeness/adapter",
            description="Trains EZIGen's adapter on a folder of images of many subjects, for more likeness on subjects "
            "of that kind. The model's weights do not change. A command-line trainer exists for large datasets.",
            search_aliases=["ezigen", "subject adapter", "training", "fine-tune adapter"],
            inputs=[*_inputs(), *_advanced_inputs()],
            optional=[
                Adapter.Input(
                    "adapter",
                    tooltip="An adapter to continue from. Without one, training starts as in EZIGen, from copies of "
                    "the model's self-attention layers, and needs the full number of steps.",
                ),
            ],
            outputs=[
                output(Adapter, "adapter", "For Apply Subject Adapter; Extract Subject Adapter saves it."),
                output(LossMap, "loss", "The loss of every step, for Plot Loss Graph."),
                output(
                    io.String,
                    "report",
                    "The files used and skipped, and the error with and without the subject's images.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, folder, size, seed, batch, learning_rate, drop=DROP, max_subjects=MAX_SUBJECTS, adapter=None, **more
    ) -> io.NodeOutput:
        pairs = PairFolder(folders.resolve_image_folder(folder), size, max_subjects)
        settings = TrainingSettings(seed, batch, learning_rate, drop)
        job = host.AdapterJob(folder=pairs, settings=settings, start=adapter, **more)
        return io.NodeOutput(*host.train_adapter(job))


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
            tooltip="A folder in ComfyUI's input folder with one subfolder per subject: images, each with <name>.txt "
            "(its caption) and <name>.mask.png (white on the subject). Press R to refresh the list.",
        ),
        inputs.side("Side in pixels of the squares that images and subjects are scaled to: the model's native size."),
        inputs.count(
            "steps",
            2000,
            10_000_000,
            "Number of updates: a few thousand when starting from the published adapter, which itself took "
            "200,000. Raise it later to resume the run.",
        ),
        inputs.count(
            "batch", 1, 256, "Images per update. EZIGen uses 1; more make the loss less noisy and multiply the memory."
        ),
        inputs.number(
            "learning_rate",
            LEARNING_RATE,
            (1e-8, 1.0, 1e-5, 1e-8),
            "AdamW's learning rate. EZIGen uses 0.0001; use 0.00001 to 0.00005 to continue from an adapter.",
        ),
        inputs.seed("Seed of the order of the images, the timesteps and the noise."),
    ]


def _advanced_inputs() -> list[io.Input]:
    return inputs.advanced(
        inputs.number(
            "drop",
            DROP,
            (0.0, 1.0, 0.05, 0.001),
            "Fraction of the samples in which the subject is dropped. The authors intended 0.1; their code drops 0.8 "
            "because of an inverted comparison.",
        ),
        inputs.count(
            "max_subjects",
            MAX_SUBJECTS,
            MAX_SUBJECTS,
            "Maximum number of other images of a subject shown with each image. EZIGen uses 4; 1 costs less "
            "and is enough if you will only ever use one.",
        ),
        inputs.checkpointing(),
    )
