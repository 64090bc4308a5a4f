"""What all nodes share: the pack's types, schemas that load on ComfyUI 0.3.75 and later, inputs that are checked by
their own schema, and no text that can break a log.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..core.fit.fit import random_numbers
from ..core.session import folders
from ..core.session.images import check_result
from ..core.session.inputs import check_axes, check_input, check_pooled, check_width
from ..core.session.outputs import loss_map, nothing, prefix_answer, save_numbered
from ..core.session.texts import ascii_only, disk_errors

Adapter = io.Custom("LIKENESS_ADAPTER")
Embedding = io.Custom("LIKENESS_EMBEDDING")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
Similarity = io.Custom("LIKENESS_SIMILARITY")
Subject = io.Custom("LIKENESS_SUBJECT")
Subjects = io.Custom("LIKENESS_SUBJECTS")
Trajectory = io.Custom("LIKENESS_TRAJECTORY")

TYPED = ("one image", "dreambooth", "face", "character", "ip-adapter")  # common search terms
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(*, inputs: list[io.Input], optional: Sequence[io.Input] = (), **fields: Any) -> io.Schema:
    """An io.Schema with the aliases that all nodes share. optional: the inputs behind the others that may be left out.
    Fields unknown to this ComfyUI (search_aliases before 0.11) are left out.
    """
    for widget in optional:
        widget.optional = True
    fields["inputs"] = [*inputs, *optional]
    fields["search_aliases"] = [*fields["search_aliases"], *TYPED]
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def output(kind: Any, name: str, tooltip: str, **more: Any) -> io.Output:
    return kind.Output(display_name=name, tooltip=tooltip, **more)


class Node(io.ComfyNode):
    """execute() of a subclass gets what its schema promises, in the process of a test as in a server."""

    def __init_subclass__(cls, files: Mapping[str, folders.Kind | None] | None = None, **more: Any) -> None:
        """files: the kinds of the model files, or None for the folders of images, that inputs name. One that is not
        there is refused before anything runs, and the node runs again when one of them changes.
        """
        super().__init_subclass__(**more)
        if files is not None:

            def states(_cls: type[Node], **inputs: Any) -> str:
                return " ".join(folders.state(kind, inputs.get(name)) for name, kind in files.items())

            def found(cls: type[Node], *given: Any, **inputs: Any) -> bool | str:
                try:
                    states(cls, **dict(zip(files, given, strict=False)), **inputs)
                except (OSError, ValueError) as error:
                    return str(error)
                return True

            # ComfyUI leaves the inputs that the signature names to this method, and those only.
            names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("cls", *files)]
            found.__signature__ = inspect.Signature(names)  # ty: ignore[missing-attribute]
            cls.fingerprint_inputs, cls.validate_inputs = classmethod(states), classmethod(found)
        execute = cls.__dict__.get("execute")  # ComfyUI runs a clone of the class each time, which has a wrapped one
        if isinstance(execute, classmethod) and not hasattr(execute.__func__, "__wrapped__"):
            schema = functools.cache(cls.define_schema)  # once: it looks for files
            cls.execute = classmethod(_checked(execute.__func__, schema))


def _checked(execute: Callable[..., io.NodeOutput], schema_of: Callable[[], io.Schema]) -> Callable[..., io.NodeOutput]:
    @functools.wraps(execute)
    def run(cls: type[Node], *arguments: Any, **named: Any) -> io.NodeOutput:
        with ascii_only(), disk_errors(), random_numbers():
            schema = schema_of()
            names = (widget.id for widget in schema.inputs)
            given = {**dict(zip(names, arguments, strict=False)), **named}
            return packed(schema, execute(cls, **checked(schema, given)))

    return run


class SavingNode(Node):
    """A node that writes its first input to a new numbered file in models/."""

    @classmethod
    def validate_inputs(cls, filename_prefix) -> bool | str:
        return prefix_answer(filename_prefix)

    @classmethod
    def saved(
        cls, kind: folders.Kind, artifact: Any, prefix: str, save: Callable[..., None], what: str
    ) -> io.NodeOutput:
        """save(path, artifact, replace=False) writes it; what: the description to show under the file's name."""
        path = save_numbered(folders.roots(kind)[0], prefix, lambda path: save(path, artifact, replace=False))
        name = folders.listed_name(kind, path)
        return io.NodeOutput(artifact, name, ui=ui.PreviewText(f"{name}\n{what}"))


def build(inputs: Mapping[str, Any], *kinds: Any) -> list[Any]:
    """An object of each dataclass, from those of a node's inputs that its fields name. TypeError for an input that
    none of them has.
    """
    names = [{field.name for field in dataclasses.fields(kind)} for kind in kinds]
    if unused := inputs.keys() - set().union(*names):
        raise TypeError(f"Nothing takes the inputs {sorted(unused)}.")
    return [
        kind(**{name: inputs[name] for name in own & inputs.keys()}) for kind, own in zip(kinds, names, strict=True)
    ]


def checked(schema: io.Schema, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a node, each checked. ValueError, with the name of the input, for the first that does not fit."""
    widgets = {widget.id: widget for widget in schema.inputs}
    found: dict[str, Any] = {}
    for name, value in given.items():
        widget = widgets[name]
        kind, limits = widget.get_io_type(), vars(widget)
        if value is None and widget.optional:
            found[name] = None
        elif schema.is_input_list:
            found[name] = [check_input(name, kind, each, limits) for each in value]
        else:
            found[name] = check_input(name, kind, value, limits)
    for name, value in found.items():
        owner = name.rpartition("_")[0]  # tuned_positive belongs to `tuned`, which the guidance compares with the model
        model = None if owner in found else found.get("model")
        kind = widgets[name].get_io_type()
        if model is None or value is None:
            continue
        if kind == "CONDITIONING":
            check_width(name, value, model, found.get("positive"))
            check_pooled(name, value, model)
        elif kind == "LATENT":
            check_axes(name, value, model)
    return found


def packed(schema: io.Schema, output: io.NodeOutput) -> io.NodeOutput:
    """The losses of a node as a LOSS_MAP; nodes behind an output that is None, or has no losses, do not run.

    RuntimeError when it gives an image, a latent or a prompt without numbers: what follows would be black.
    """
    values = []
    for wanted, value in zip(schema.outputs, output.args, strict=True):
        kind = wanted.get_io_type()
        if kind == "LOSS_MAP":
            value = loss_map(value) if value else None
        elif kind in ("IMAGE", "LATENT", "CONDITIONING"):
            for tensor in _tensors(value):
                check_result(wanted.display_name, tensor)
        values.append(nothing() if value is None else value)
    output.args = tuple(values)
    return output


def _tensors(value: Any) -> list[Tensor]:
    """Of an image, a latent or the prompts of a conditioning."""
    entries = [each[0] for each in value] if isinstance(value, list) else [value]
    found = [each.get("samples") if isinstance(each, Mapping) else each for each in entries]
    return [each for each in found if isinstance(each, Tensor)]
