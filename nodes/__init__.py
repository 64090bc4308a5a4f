"""Node definitions: names, inputs and outputs. The work is done in core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..core.session.folders import register_folders
from ..core.session.texts import keep_log_plain


class LikenessExtension(ComfyExtension):
    """The extension that gives ComfyUI the list of nodes."""

    async def on_load(self) -> None:
        register_folders()
        keep_log_plain()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from . import (
            adapter,
            align,
            embedding,
            embedding_files,
            fine_tune,
            guidance,
            inspect,
            inversion,
            masks,
            optimize_lora,
            position_map,
            reference,
            refine,
            renoise,
            replace,
            sana,
            score,
            similarity,
            staged,
            sweep,
            train_adapter,
            tuned_files,
        )

        modules = (embedding, refine, embedding_files, inspect, fine_tune, tuned_files, guidance, position_map, sweep)
        modules += (inversion, renoise, masks, align, reference, replace, similarity, optimize_lora, sana, score)
        modules += (adapter, staged, train_adapter)
        return [node for module in modules for node in module.NODES]
