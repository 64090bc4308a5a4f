"""A subject from one image without training: EZIGen's adapter, and the images it reads."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.ezigen.artifact import read_adapter, save_adapter
from ..core.ezigen.host import adapter as host
from ..core.ezigen.staged import SPLIT_RATIO
from ..core.session import folders
from ..core.session.outputs import numbered_path
from .types import Adapter, Subject, advanced, schema, seed_input


class LikenessLoadAdapter(io.ComfyNode):
    """A file or folder of models/likeness_adapters -> LIKENESS_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadAdapter",
            display_name="Load Subject Adapter",
            category="likeness/adapter",
            description="Loads EZIGen's adapter from models/likeness_adapters: the authors' checkpoint as it was "
            "published, a file of Extract Adapter, or one that was trained here.",
            search_aliases=["ezigen", "subject adapter", "zero-shot", "reference unet"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.names(folders.ADAPTERS),
                    tooltip="A file in models/likeness_adapters, or the folder of a published checkpoint "
                    "(checkpoint-200000) there. Press R to refresh the list.",
                )
            ],
            outputs=[
                Adapter.Output(display_name="adapter", tooltip="For Apply Subject Adapter."),
                io.String.Output(display_name="info", tooltip="Its blocks and widths, and the steps of its training."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name) -> bool | str:
        known = name is None or name in folders.names(folders.ADAPTERS)  # None: it comes by a link
        return True if known else host.adapter_missing(name)

    @classmethod
    def fingerprint_inputs(cls, name) -> str:
        return folders.state(folders.ADAPTERS, name)

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        adapter = read_adapter(folders.resolve(folders.ADAPTERS, name))
        return io.NodeOutput(adapter, adapter.describe())


class LikenessExtractAdapter(io.ComfyNode):
    """LIKENESS_ADAPTER -> a safetensors file of its tensors alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessExtractAdapter",
            display_name="Extract Subject Adapter",
            category="likeness/adapter",
            description="Saves an adapter alone, in models/likeness_adapters: of the published checkpoint of 3.7 GB, "
            "0.1 or 0.2 GB are the adapter; the rest is the UNet that you have already.",
            search_aliases=["ezigen", "save adapter", "convert checkpoint"],
            inputs=[
                Adapter.Input("adapter", tooltip="From Load Subject Adapter, or trained here."),
                io.Combo.Input(
                    "dtype",
                    options=list(host.DTYPES),
                    default="float16",
                    tooltip="Precision of the file. float32 keeps every bit and is twice as large.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="likeness/adapter",
                    tooltip="Name of the file, with sub-folders if you like; a number is added, nothing is "
                    "overwritten.",
                ),
            ],
            outputs=[
                Adapter.Output(display_name="adapter", tooltip="The adapter, passed on."),
                io.String.Output(
                    display_name="name", tooltip="The name under which Load Subject Adapter lists the file."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter, dtype, filename_prefix) -> io.NodeOutput:
        path = numbered_path(folders.first_folder(folders.ADAPTERS), filename_prefix, ".safetensors")
        save_adapter(path, adapter, host.DTYPES[dtype])
        name = folders.listed_name(folders.ADAPTERS, path)
        return io.NodeOutput(adapter, name, ui=ui.PreviewText(f"{name}\n{adapter.describe()}"))


class LikenessEncodeSubject(io.ComfyNode):
    """MODEL + images of a subject -> LIKENESS_SUBJECT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessEncodeSubject",
            display_name="Encode Subject",
            category="likeness/adapter",
            description="Shows a subject's images to the model itself and keeps what its self-attentions see "
            "(EZIGen). The adapter reads that. Done once for an image, in one model call.",
            search_aliases=["ezigen", "reference", "subject features"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled. LoRAs on it count, patches do not."),
                io.Vae.Input("vae", tooltip="Encodes the images."),
                io.Conditioning.Input("positive", tooltip='The subject\'s class, encoded: "a photo of a dog".'),
                io.Image.Input(
                    "image",
                    tooltip="The subject, one image or a batch of several. Transparency counts as a mask. Without a "
                    "mask it must stand on white already.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Side of the square that the subject is brought to: 512 for SD1.x and SD2.1-base.",
                ),
                seed_input("Of the little noise that is put on the images."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on the subject: it is cut out square and put on white, as the adapter was trained. "
                    "An empty one counts as none; one that is white in all four corners, as Load Image gives for a "
                    "transparent image, is turned over.",
                ),
                Subject.Input("subject", optional=True, tooltip="Another subject to add these images to."),
                *advanced(
                    io.Float.Input(
                        "margin",
                        default=host.MARGIN,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="White around a masked subject, as a part of its longer side.",
                    )
                ),
            ],
            outputs=[
                Subject.Output(display_name="subject", tooltip="For Apply Subject Adapter."),
                io.Image.Output(display_name="seen", tooltip="The images as they were encoded: check the cut-out."),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, positive, image, size, seed, mask=None, subject=None, margin=host.MARGIN
    ) -> io.NodeOutput:
        images = host.prepare_images(image, mask, size, margin)
        found = host.encode_subject(model, vae, positive, images, seed)
        return io.NodeOutput(found if subject is None else subject.with_subject(found), images)


class LikenessApplyAdapter(io.ComfyNode):
    """MODEL + adapter + subject -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessApplyAdapter",
            display_name="Apply Subject Adapter",
            category="likeness/adapter",
            description="Lets a model look at an encoded subject while it samples (EZIGen), in the last part of the "
            "steps: the text lays the image out, then the subject appears in it. For every sampler.",
            search_aliases=["ezigen", "subject driven", "zero-shot", "reference only"],
            inputs=[
                io.Model.Input("model", tooltip="The very model that encoded the subject. It is not changed."),
                Adapter.Input("adapter", tooltip="From Load Subject Adapter: SD2.1-base for the published one."),
                Subject.Input("subject", tooltip="From Encode Subject."),
                io.Float.Input(
                    "split_ratio",
                    default=SPLIT_RATIO,
                    min=0.01,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="In which last part of this sampling's steps the subject is looked at. 0.4 is published; "
                    "more is more alike and less free, 1 is from the first step. With a denoise below 1 or a part of "
                    "the steps it is a part of what is left.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How much of what the adapter adds is taken. 1 is published, 0 is the model alone.",
                ),
                *advanced(
                    io.Combo.Input(
                        "apply_to",
                        options=list(host.APPLY_TO),
                        default=host.APPLY_TO[0],
                        tooltip="both: the negative prompt sees the subject too, as published. positive only: the "
                        "guidance then also pulls towards the subject, more strongly.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the subject, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, adapter, subject, split_ratio, strength, apply_to=host.APPLY_TO[0]) -> io.NodeOutput:
        return io.NodeOutput(host.with_adapter(model, adapter, subject, split_ratio, strength, apply_to))


NODES = [LikenessLoadAdapter, LikenessExtractAdapter, LikenessEncodeSubject, LikenessApplyAdapter]
