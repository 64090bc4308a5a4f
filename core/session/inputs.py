"""One place for what comes into a node: every value is checked by the type that the node's schema gives its input.

ComfyUI checks the widgets of a prompt in part (0.3.75 does not look at the choices of a V3 combo, NaN passes each
range), and a value that comes by a link not at all. Each check raises ValueError with what was given, what is expected
and what to do.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..files import MAX_TEXT, is_number
from .images import check_finite, check_image, check_range

POOLED = "pooled_output"
ENCODE = "encode the prompt again, with the text encoder in fp32"
SHOWN = 60  # characters of a value in a message


class Names(list[str]):
    """The choices of a combo that were on the disk when it was listed: folders.resolve() tells what is there now."""


def check_input(name: str, kind: str, value: Any, options: Mapping[str, Any]) -> Any:
    """The value of an input of this type (ComfyUI's or the pack's name of it), as the node gets it.

    options: min, max and options of a widget. ValueError for what the node could not use.
    """
    if kind in _WIDGETS:
        return _WIDGETS[kind](name, value, options)
    check = _TENSORS.get(kind)
    if check is not None:
        check(name, value)
    elif not all(hasattr(value, attribute) for attribute in _OBJECTS.get(kind, ())):
        missing = value is None and kind in _LOADERS
        remedy = f"the loaded file has none, connect Load {kind}" if missing else f"connect a node that gives {kind}"
        raise _unfit(name, value, f"a {kind}", remedy)
    return value


def check_axes(name: str, latent: Any, model: Any) -> None:
    """ValueError for the latent of a video where this model makes single images."""
    samples, expected = latent["samples"], 2 + getattr(model.get_model_object("latent_format"), "latent_dimensions", 2)
    if not getattr(samples, "is_nested", False) and samples.ndim > expected:
        raise ValueError(
            f"'{name}' is {shown(samples)}, expected {expected} axes for this model: use its own VAE, on an image."
        )


def check_width(name: str, conditioning: Sequence[Any], model: Any, positive: Sequence[Any] | None = None) -> None:
    """ValueError when a prompt's tokens are not as wide as this model's, as far as its configuration or the positive
    prompt tells.
    """
    config = getattr(getattr(getattr(model, "model", None), "model_config", None), "unet_config", {})
    width = config.get("context_dim", positive[0][0].shape[-1] if positive else None)
    for tokens, _ in conditioning:
        if isinstance(width, int) and tokens.shape[-1] != width:
            raise ValueError(
                f"'{name}' has tokens of width {tokens.shape[-1]}, expected {width}: it belongs to another model "
                "family, connect prompts of this model's own text encoder."
            )


def check_pooled(name: str, conditioning: Sequence[Any], model: Any) -> None:
    """ValueError when a prompt lacks the pooled output that this model asks for, as SDXL does, or has another's."""
    encode = getattr(getattr(model, "model", None), "encode_adm", None)
    width = getattr(getattr(model, "model", None), "adm_channels", 0)
    made_up = {"device": "cpu", "noise": torch.zeros(1, 4, 8, 8), "width": 64, "height": 64, "prompt_type": "positive"}
    remedy = "connect a prompt of this model's own text encoder, as CLIP Text Encode gives it."
    for _, options in conditioning if encode else ():
        try:
            with torch.random.fork_rng(devices=[]):
                vector = encode(**{**options, **made_up})
        except Exception as error:  # of what else the model asks for, the session will say
            if error.args == (POOLED,) or options.get(POOLED) is None and "NoneType" in str(error):
                raise ValueError(f"'{name}' has no {POOLED}, expected with this model: {remedy}") from error
            continue
        own = options[POOLED].shape[-1] if options.get(POOLED) is not None else 0
        if own and width and isinstance(vector, Tensor) and vector.shape[-1] != width:
            expected = own + width - vector.shape[-1]  # the vector holds more than that, such as sizes
            raise ValueError(f"'{name}' has a {POOLED} of width {own}, expected {expected}: {remedy}")


def shown(value: Any) -> str:
    """A value in a message: short and ASCII, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None:
        return "nothing"
    if isinstance(value, (str, Real)):
        text = value if isinstance(value, str) else str(value)
        text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        return ascii(text) if isinstance(value, str) else text
    return f"a {ascii(type(value).__name__)[1:-1]}"


def _unfit(name: str, value: Any, expected: str, remedy: str) -> ValueError:
    return ValueError(f"'{name}' is {shown(value)}, expected {expected}: {remedy}.")


def _choice(name: str, value: Any, options: Mapping[str, Any]) -> Any:
    choices = options.get("options")
    if isinstance(choices, Names) or not choices:
        return _text(name, value, options)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise _unfit(name, value, "one of " + ", ".join(map(ascii, choices)), "choose one of these")
    return value


def _text(name: str, value: Any, _options: Mapping[str, Any]) -> str:
    if not isinstance(value, str):
        raise _unfit(name, value, "a text", "connect a STRING")
    if len(value) > MAX_TEXT:
        raise ValueError(f"'{name}' has {len(value)} characters, expected {MAX_TEXT} at most: shorten it.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _unfit(name, value, "a text of whole characters", "write it again, a lone surrogate is none") from None
    return value


def _flag(name: str, value: Any, _options: Mapping[str, Any]) -> bool:
    if not isinstance(value, bool) and not (isinstance(value, Real) and value in (0, 1)):
        raise _unfit(name, value, "true or false", "connect a BOOLEAN")
    return bool(value)


def _number(name: str, value: Any, options: Mapping[str, Any]) -> float:
    low, high = options.get("min"), options.get("max")
    span = "a number" if low is None or high is None else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not is_number(value):
        raise _unfit(name, value, span, "give a finite number")
    if (low is not None and value < low) or (high is not None and value > high):
        raise _unfit(name, value, span, "change it")
    return float(value)


def _integer(name: str, value: Any, options: Mapping[str, Any]) -> int:
    number = _number(name, value, options)
    if number != int(number):
        raise _unfit(name, value, "a whole number", "round it")
    return int(value)


def _images(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise _unfit(name, value, "images [batch, height, width, 3]", "connect an IMAGE")
    check_image(value, name)


def _mask(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or not value.numel():
        raise _unfit(name, value, "a mask [batch, height, width]", "connect a MASK")
    whole = value.dtype in (torch.bool, torch.uint8, torch.int32, torch.int64) and not value.is_meta
    check_range(name, value.float() if whole else value, "make the mask again")


def _latent(name: str, value: Any) -> None:
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if getattr(samples, "is_nested", False):
        return  # of a model for several media at once: the node says what it can do with it
    if not isinstance(samples, Tensor) or samples.ndim < 4 or not samples.numel():
        raise _unfit(name, samples, "a latent [batch, channels, height, width]", "connect a LATENT")
    check_finite(name, samples, "encode the image again, with the VAE in fp32")


def _conditioning(name: str, value: Any) -> None:
    expected, remedy = "a list of prompts, each with its tokens [1, tokens, width]", "connect a CONDITIONING"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _unfit(name, value if value != [] else None, expected, remedy)
    for entry in value:
        pair = isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], Mapping)
        if not pair or not isinstance(entry[0], Tensor) or entry[0].ndim != 3 or not entry[0].numel():
            raise _unfit(name, entry[0] if pair else entry, expected, remedy)
        check_finite(name, entry[0], ENCODE)
        pooled = entry[1].get(POOLED)
        if pooled is not None:
            check_finite(f"{name}: {POOLED}", pooled, ENCODE)
            if pooled.ndim < 2:
                raise _unfit(f"{name}: {POOLED}", pooled, "[1, width]", ENCODE)
        for option, fits in _OPTIONS.items():
            if option in entry[1] and not fits(entry[1][option]):
                raise _unfit(f"{name}: {option}", entry[1][option], "what ComfyUI's own nodes attach", ENCODE)


def _subjects(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(hasattr(each, "weight") for each in value):
        raise _unfit(name, value, "fine-tuned models with their weights", "connect Subject Model")


def _sigmas(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim != 1 or len(value) < 2:
        raise _unfit(name, value, "two noise levels or more [steps + 1]", "connect SIGMAS, from a scheduler")
    check_finite(name, value, "take them from a scheduler")
    if bool((value < 0).any()) or bool((value.diff() >= 0).any()):
        given = ", ".join(f"{float(level):g}" for level in value[:6])
        raise _unfit(name, given, "falling noise levels of 0 or more", "connect a scheduler's, do not flip or cut them")


_WIDGETS: dict[str, Callable[[str, Any, Mapping[str, Any]], Any]] = {
    "COMBO": _choice, "STRING": _text, "BOOLEAN": _flag, "FLOAT": _number, "INT": _integer,
}  # fmt: skip
_TENSORS: dict[str, Callable[[str, Any], None]] = {
    "IMAGE": _images, "MASK": _mask, "LATENT": _latent, "CONDITIONING": _conditioning, "SIGMAS": _sigmas,
    "LIKENESS_SUBJECTS": _subjects,
}  # fmt: skip
# Of a prompt, where ComfyUI itself uses them unseen.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("strength", "mask_strength", "start_percent", "end_percent"), is_number),
    "control": lambda given: hasattr(given, "get_control"),
    "hooks": lambda given: hasattr(given, "hooks"),
    "gligen": lambda given: isinstance(given, Sequence) and len(given) == 3 and hasattr(given[1], "model"),
    "area": lambda given: isinstance(given, Sequence),
    "mask": lambda given: isinstance(given, Tensor),
}
_LOADERS = "CLIP", "VAE"  # a checkpoint without one gives nothing in its place
# What the nodes ask of objects, so that another pack's own version of one will do.
_OBJECTS: dict[str, tuple[str, ...]] = {
    "MODEL": ("clone", "model", "get_model_object", "load_device"),
    "CLIP": ("tokenize", "clone", "patcher"),
    "VAE": ("encode", "decode"),
    "CLIP_VISION": ("encode_image",),
    "NOISE": ("generate_noise",),
    "SAMPLER": ("sample",),
    "LORA_MODEL": ("keys", "values"),
    "LIKENESS_ADAPTER": ("tensors", "header"),
    "LIKENESS_EMBEDDING": ("rows", "header"),
    "LIKENESS_SIMILARITY": ("parts",),
    "LIKENESS_SUBJECT": ("tokens", "base"),
    "LIKENESS_TRAJECTORY": ("latents", "sigmas"),
}
