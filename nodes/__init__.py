"""Node definitions: names, inputs and outputs. The work is done in core."""

import pkgutil
from importlib import import_module

from comfy_api.latest import ComfyExtension, io

from ..core.session.folders import register_folders
from ..core.session.progress import show_warnings
from ..core.session.texts import keep_log_plain
from .node import Node


class LikenessExtension(ComfyExtension):
    """The extension that gives ComfyUI the list of nodes: every Node that a file of this folder has."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folders()  # here, since older ComfyUI does not call on_load()
        keep_log_plain()
        show_warnings()
        modules = [import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
        classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
        return [each for each in classes if issubclass(each, Node) and "define_schema" in vars(each)]
