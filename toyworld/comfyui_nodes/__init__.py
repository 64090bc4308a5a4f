"""A second custom node folder, used by the demo and the tests of the small world only: the judge's subject mask."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io


def _judge_module() -> object:
    """toyworld/judge.py, loaded by its path: this folder is installed on its own, possibly as a link."""
    name = "likeness_toyworld_judge"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "judge.py"
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


class SmallWorldExtension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        return [ToyworldSubjectMask]


async def comfy_entrypoint() -> SmallWorldExtension:
    """ComfyUI calls this."""
    return SmallWorldExtension()
