"""Subjects from a single image without training: EZIGen's adapter and the reference images it attends to."""

import functools

from comfy_api.latest import io

from ..core.ezigen.artifact import read_adapter, save_adapter
from ..core.ezigen.host import adapter as host
from ..core.session import folders
from . import inputs
from .node import Adapter, Node, SavingNode, Subject, output, schema


class LikenessLoadAdapter(Node, files={"name": folders.ADAPTERS}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadAdapter",
            display_name="Load Subject Adapter",
            category="likeness/adapter",
            description="Loads an EZIGen adapter from models/likeness_adapters: the authors' published checkpoint, a "
            "file saved by Extract Subject Adapter, or an adapter trained with this pack.",
            search_aliases=["ezigen", "subject adapter", "zero-shot", "reference unet"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.ADAPTERS),
                    tooltip="A file in models/likeness_adapters, or a published checkpoint folder there "
                    "(checkpoint-200000). Press R to refresh the list.",
                )
            ],
            outputs=[
                output(Adapter, "adapter", "The adapter, for Apply Subject Adapter."),
                output(io.String, "info", "Its blocks and widths, and the number of training steps."),
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        adapter = read_adapter(folders.resolve(folders.ADAPTERS, name))
        return io.NodeOutput(adapter, adapter.describe())


class LikenessExtractAdapter(SavingNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessExtractAdapter",
            display_name="Extract Subject Adapter",
            category="likeness/adapter",
            description="Saves the adapter alone to models/likeness_adapters. It is 0.1 or 0.2 GB of the published "
            "3.7 GB checkpoint; the rest is the UNet you already have.",
            search_aliases=["ezigen", "save adapter", "convert checkpoint"],
            inputs=[
                Adapter.Input("adapter", tooltip="An adapter from Load Subject Adapter or Train Subject Adapter."),
                inputs.choice(
                    "dtype", host.DTYPES, "Precision of the saved file. float32 is lossless and twice as large."
                ),
                inputs.prefix("likeness/adapter"),
            ],
            outputs=[
                output(Adapter, "adapter", "The adapter, passed through."),
                output(io.String, "name", "The name under which Load Subject Adapter lists the file."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter, dtype, filename_prefix) -> io.NodeOutput:
        save = functools.partial(save_adapter, dtype=host.DTYPES[dtype])
        return cls.saved(folders.ADAPTERS, adapter, filename_prefix, save, adapter.describe())


class LikenessEncodeSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessEncodeSubject",
            display_name="Encode Subject",
            category="likeness/adapter",
            description="Runs a subject's images through the model once and records its self-attention features, "
            "which the adapter attends to (EZIGen).",
            search_aliases=["ezigen", "reference", "subject features"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. LoRAs on it apply, patches do not."),
                io.Vae.Input("vae", tooltip="Encodes the images."),
                io.Conditioning.Input("positive", tooltip='A prompt of the subject\'s class: "a photo of a dog".'),
                io.Image.Input(
                    "image",
                    tooltip="One or more images of the subject. An alpha channel is used as the mask; without a mask "
                    "the background must already be white.",
                ),
                inputs.side(
                    "Side in pixels of the square that the subject is scaled to. 512 for SD1.x and SD2.1-base."
                ),
                inputs.seed("Seed of the small amount of noise added to the images."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on the subject, which is then cropped to a square on white, as in the adapter's "
                    "training. An empty mask is ignored; one that is white in all four corners (Load Image with a "
                    "transparent image) is inverted.",
                ),
                Subject.Input("subject", optional=True, tooltip="An encoded subject to add these images to."),
                *inputs.advanced(
                    inputs.number(
                        "margin",
                        host.MARGIN,
                        (0.0, 1.0, 0.01),
                        "White border around a masked subject, as a fraction of its longer side.",
                    )
                ),
            ],
            outputs=[
                output(Subject, "subject", "The encoded subject, for Apply Subject Adapter."),
                output(io.Image, "seen", "The images as they were encoded, to check the crop."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, image, size, seed, mask=None, subject=None, margin=host.MARGIN
    ) -> io.NodeOutput:
        images = host.prepare_images(image, mask, size, margin)
        found = host.encode_subject(model, vae, positive, images, seed)
        return io.NodeOutput(found if subject is None else subject.with_subject(found), images)


class LikenessApplyAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessApplyAdapter",
            display_name="Apply Subject Adapter",
            category="likeness/adapter",
            description="Makes a model attend to an encoded subject in the last part of the steps (EZIGen): the "
            "prompt sets the layout, then the subject appears in it. Works with any sampler.",
            search_aliases=["ezigen", "subject driven", "zero-shot", "reference only"],
            inputs=[
                io.Model.Input("model", tooltip="The same model that encoded the subject. It is not changed."),
                Adapter.Input("adapter", tooltip="From Load Subject Adapter. The published adapter is for SD2.1-base."),
                Subject.Input("subject", tooltip="From Encode Subject."),
                inputs.split_ratio(
                    1.0,
                    "Fraction of the steps, counted from the end, in which the adapter is active. EZIGen uses 0.4; "
                    "higher gives more likeness and less freedom, 1 starts at the first step. With denoise below 1 or "
                    "a partial run, it is a fraction of the remaining steps.",
                ),
                inputs.number(
                    "strength",
                    1.0,
                    (0.0, 2.0, 0.05, 0.001),
                    "Scale of the adapter's output. 1 is EZIGen's value, 0 is the model alone.",
                ),
                *inputs.advanced(
                    inputs.choice(
                        "apply_to",
                        host.APPLY_TO,
                        "both: the negative prompt sees the subject too, as in EZIGen. positive only: guidance also "
                        "pulls towards the subject, which is stronger.",
                    )
                ),
            ],
            outputs=[output(io.Model, "model", "The model with the subject, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, adapter, subject, split_ratio, strength, apply_to=host.APPLY_TO[0]) -> io.NodeOutput:
        return io.NodeOutput(host.with_adapter(model, adapter, subject, split_ratio, strength, apply_to))
