"""Load Sana, which ComfyUI does not support, as MODEL, CLIP and VAE."""

from comfy_api.latest import io

from ..core.sana.host import sana as host
from ..core.session import folders
from . import inputs
from .node import Node, output, schema


class LikenessLoadSana(Node, files={"name": folders.DIFFUSERS}):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LikenessLoadSana",
            display_name="Load Sana",
            category="likeness/loaders",
            description="Loads Sana from a diffusers folder as an ordinary MODEL, CLIP and VAE, for stock samplers "
            "and this pack's nodes. Needs the diffusers package. Nothing is downloaded.",
            search_aliases=["sana", "diffusers", "dc-ae", "gemma"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=host.sana_names(),
                    tooltip="A folder in models/diffusers with model_index.json and the subfolders transformer, vae, "
                    "text_encoder, tokenizer and scheduler, such as Sana_1600M_512px_diffusers. Press R to refresh "
                    "the list.",
                ),
                *inputs.advanced(
                    inputs.choice(
                        "dtype",
                        host.DTYPES,
                        "Precision of the diffusion model. default: bf16 if the device is fast at it, else fp32, as "
                        "in SISO's reference code.",
                    ),
                    io.Boolean.Input(
                        "instruction",
                        default=True,
                        tooltip="Prepends Sana's published instruction, which asks for details, to every non-empty "
                        "prompt. Off: encodes prompts as they are.",
                    ),
                ),
            ],
            outputs=[
                output(io.Model, "model", "The diffusion model."),
                output(io.Clip, "clip", "The text encoder (Gemma), for prompts."),
                output(
                    io.Vae,
                    "vae",
                    "The autoencoder. Its latents are 32 times smaller than images; start from "
                    "EmptyHunyuanImageLatent.",
                ),
                output(
                    io.Clip,
                    "plain_clip",
                    "The same text encoder without the instruction, for a non-empty negative prompt.",
                ),
            ],
        )

    @classmethod
    def execute(cls, name, dtype="default", instruction=True) -> io.NodeOutput:
        return io.NodeOutput(*host.load_sana(folders.resolve(folders.DIFFUSERS, name), dtype, instruction))
