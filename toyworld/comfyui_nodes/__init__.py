"""A second custom node folder, used by the demo and the tests of the small world only: the judge's subject mask
and its captions, loaders in the place of those of large models, and the pack's gradient checks.
"""

from __future__ import annotations

import importlib
from typing import Any

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

TRAINED, RANDOM = ("small_world_flow", "small_world_flow_turbo"), "random tiny "
CHECKPOINTS = ("likeness_small_world.safetensors", "likeness_small_world_turbo.safetensors")
KINDS = (*TRAINED, *(f"{RANDOM}{name}" for name in ("FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image")))


def _pack(module: str) -> Any:
    """A module of the pack that this server has loaded."""
    import nodes

    pack = nodes.NODE_CLASS_MAPPINGS["LikenessLoadVision"].__module__.rpartition(".nodes.")[0]
    return importlib.import_module(f"{pack}.{module}")


def _family(kind: str) -> Any:
    """The random model's family."""
    return _pack("tests.tiny_families").families()[kind.removeprefix(RANDOM)]


class ToyworldSubjectMask(io.ComfyNode):
    """IMAGE -> MASK of the subject."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One input; the outputs are those of the pack's Subject Mask, in whose place it stands."""
        return io.Schema(
            node_id="ToyworldSubjectMask",
            display_name="Subject Mask (small world)",
            category="likeness/small world",
            description="The subject's mask in a picture of the small world, found by its judge.",
            inputs=[io.Image.Input("image", tooltip="Pictures of the small world.")],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="1 on the subject, 0 elsewhere."),
                io.Image.Output(display_name="picture", tooltip="The pictures with the rest darkened."),
                io.String.Output(display_name="info", tooltip="How large the subjects are."),
            ],
        )

    @classmethod
    def execute(cls, image: object) -> io.NodeOutput:
        """Run the judge."""
        mask = (_pack("toyworld.judge").load_judge().mask(image.movedim(-1, 1)[:, :3]) > 0.5).float()
        info = ", ".join(f"{100 * share:.1f} %" for share in mask.mean((1, 2)).tolist())
        return io.NodeOutput(mask, image[..., :3] * (0.3 + 0.7 * mask[..., None]), info)


class ToyworldCaption(io.ComfyNode):
    """IMAGE -> what it shows, in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """One input; the outputs are those of the pack's Caption Image, in whose place it stands."""
        return io.Schema(
            node_id="ToyworldCaption",
            display_name="Caption Image (small world)",
            category="likeness/small world",
            description="What a picture of the small world shows, as its judge sees it.",
            inputs=[io.Image.Input("image", tooltip="Pictures of the small world.")],
            outputs=[
                io.String.Output(display_name="caption", tooltip="Of the first picture."),
                io.String.Output(display_name="captions", tooltip="Of all pictures.", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, image: Any) -> io.NodeOutput:
        """Ask the judge."""
        world = _pack("toyworld.world")
        seen = _pack("toyworld.judge").load_judge().attributes(image.movedim(-1, 1)[:, :3])
        places = list(world.BACKGROUNDS.values())
        words = [
            f"a photo of a {world.CLASSES[kind]} {places[place]}"
            for kind, place in zip(seen["class"].tolist(), seen["background"].tolist(), strict=True)
        ]
        return io.NodeOutput(words[0], words)


def _checkpoint(kind: str) -> tuple:
    import comfy.sd

    path = folder_paths.get_full_path_or_raise("checkpoints", f"likeness_{kind}.safetensors")
    return comfy.sd.load_checkpoint_guess_config(path)


def _loader(what: str, output: type[io.Output]) -> io.Schema:
    return io.Schema(
        node_id=f"ToyworldLoad{what}",
        display_name=f"Load {what} (small world)",
        category="likeness/small world",
        description="In the place of a loader of a large model.",
        inputs=[io.Combo.Input("kind", options=list(KINDS), tooltip="Which small model.")],
        outputs=[output],
    )


class ToyworldLoadModel(io.ComfyNode):
    """A small MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As UNETLoader's."""
        return _loader("Model", io.Model.Output(display_name="MODEL"))

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """Load or make it."""
        return io.NodeOutput(_checkpoint(kind)[0] if kind in TRAINED else _family(kind).model())


class ToyworldLoadCLIP(io.ComfyNode):
    """A small CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As CLIPLoader's and DualCLIPLoader's."""
        return _loader("CLIP", io.Clip.Output(display_name="CLIP"))

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """Load or make it."""
        if kind in TRAINED:
            return io.NodeOutput(_checkpoint(kind)[1])
        family, models = _family(kind), _pack("tests.tiny_models")
        return io.NodeOutput(models.clip_flux() if family.padded else models.clip_qwen(family.width))


class ToyworldLoadVAE(io.ComfyNode):
    """A small VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As VAELoader's."""
        return _loader("VAE", io.Vae.Output(display_name="VAE"))

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """Load or make it."""
        return io.NodeOutput(_checkpoint(kind)[2] if kind in TRAINED else _family(kind).autoencoder())


class ToyworldLoadCheckpoint(io.ComfyNode):
    """The checkpoint's function at 1/25 of its cost."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """As CheckpointLoaderSimple's."""
        return io.Schema(
            node_id="ToyworldLoadCheckpoint",
            display_name="Load Checkpoint (small world, at its trained width)",
            category="likeness/small world",
            description="In the place of the stock loader, which takes networks of SD1.5's width alone.",
            inputs=[io.Combo.Input("ckpt_name", options=list(CHECKPOINTS), tooltip="The file that it stands for.")],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        """Load its parts."""
        return io.NodeOutput(*_pack("toyworld.narrow").load_stock(student=ckpt_name == CHECKPOINTS[1]))


class ToyworldCheckGradients(io.ComfyNode):
    """The pack's own gradient checks, in the process that a server's other nodes run in."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """A model's parts, as a loader gives them."""
        return io.Schema(
            node_id="ToyworldCheckGradients",
            display_name="Check Gradients (small world)",
            category="likeness/small world",
            description="Gradients through a model and its autoencoder against finite differences.",
            inputs=[
                io.Model.Input("model", tooltip="With or without checkpointing, through a LoRA and to the latent."),
                io.Vae.Input("vae", tooltip="Its decoder."),
                io.Conditioning.Input("positive", tooltip="One prompt."),
                io.Latent.Input("latent", tooltip="The size."),
            ],
            outputs=[io.String.Output(display_name="errors", tooltip="Relative errors, one a line.")],
        )

    @classmethod
    def execute(cls, model: object, vae: object, positive: list, latent: dict) -> io.NodeOutput:
        """Run the checks of the pack that this server has loaded."""
        import comfy.sample

        checks = _pack("tests.gradients")
        shape = comfy.sample.fix_empty_latent_channels(model, latent["samples"]).shape
        samples = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        found = []
        for again in (False, True):
            found.append(checks.check_lora(model, positive, samples, checkpointing=again))
            found.append(checks.check_latent(model, positive, samples, checkpointing=again))
            found.append(checks.check_vae_decode(vae, samples, checkpointing=again))
        return io.NodeOutput("\n".join(f"{each.name} {each.numeric:.6g} {each.relative_error:.6g}" for each in found))


class SmallWorldExtension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [
            ToyworldSubjectMask,
            ToyworldCaption,
            ToyworldLoadModel,
            ToyworldLoadCLIP,
            ToyworldLoadVAE,
            ToyworldLoadCheckpoint,
            ToyworldCheckGradients,
        ]


async def comfy_entrypoint() -> SmallWorldExtension:
    """ComfyUI calls this."""
    return SmallWorldExtension()
