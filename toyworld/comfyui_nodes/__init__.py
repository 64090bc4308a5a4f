"""A second custom node folder, used by the demo and the tests of the small world only: the judge's subject mask,
loaders in the place of those of large models, and the pack's gradient checks.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

ROOT = Path(__file__).resolve().parents[2]
TRAINED, RANDOM = ("small_world_flow", "small_world_flow_turbo"), "random tiny "
KINDS = (*TRAINED, *(f"{RANDOM}{name}" for name in ("FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image")))


def _judge_module() -> object:
    """toyworld/judge.py."""
    return _loaded("likeness_toyworld_judge", ROOT / "toyworld" / "judge.py")


def _tests(module: str) -> object:
    """A module of the tests, of the pack that this server has loaded."""
    import nodes

    pack = nodes.NODE_CLASS_MAPPINGS["LikenessLoadVision"].__module__.rpartition(".nodes.")[0]
    return importlib.import_module(f"{pack}.tests.{module}")


def _family(kind: str) -> object:
    """The random model's family."""
    return _tests("tiny_families").families()[kind.removeprefix(RANDOM)]


def _loaded(name: str, path: Path) -> object:
    """A module of the repository, by its path: this folder is installed on its own, possibly as a link."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


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
        mask = (_judge_module().load_judge().mask(image.movedim(-1, 1)[:, :3]) > 0.5).float()
        info = ", ".join(f"{100 * share:.1f} %" for share in mask.mean((1, 2)).tolist())
        return io.NodeOutput(mask, image[..., :3] * (0.3 + 0.7 * mask[..., None]), info)


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
        family, models = _family(kind), _tests("tiny_models")
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

        checks = _tests("gradients")
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
        return [ToyworldSubjectMask, ToyworldLoadModel, ToyworldLoadCLIP, ToyworldLoadVAE, ToyworldCheckGradients]


async def comfy_entrypoint() -> SmallWorldExtension:
    """ComfyUI calls this."""
    return SmallWorldExtension()
