"""Fingerprints of the base model that an artifact was made for, and digests of what is attached to it."""

import logging
from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..fit.runs import digest
from .describe import PATCHER, contents_of_file, describe, sampled, unique_value
from .weights import NOTES, WINDOWS, is_pack_guidance, sampling_keys, uncompiled

log = logging.getLogger("likeness")
FIXED = ("family", "prediction", "latent_format", "shapes")
QUANTISED = (
    "scaled_fp8",
    "scale_weight",
    "scale_input",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "comfy_quant",
)


def fingerprint(model: Any) -> dict[str, str]:
    """Family, prediction type, latent format and UNet shapes, which must match, and a hash of 16 weights, which should.

    The shapes are empty when layers pack or hide their weights: a quantised model has a different hash, and so a
    different run key, but its shapes are not compared with those of the original file.
    """
    base = model.model
    state = network_of_file(model)
    names = (name for name in state if name.rpartition(".")[2] not in QUANTISED)  # a quantised file is the same model
    shapes = {name: list(state[name].shape) for name in names}
    weights = {name: value for name, value in state.items() if value.ndim >= 2 and name.endswith(".weight")}
    plain = bool(weights) and all(value.is_floating_point() and not value.is_meta for value in weights.values())
    return {
        "family": type(base.model_config).__name__,
        "prediction": base.model_type.name,
        "latent_format": type(base.latent_format).__name__,
        "shapes": digest(shapes) if plain else "",
        "content": digest(sampled(weights) or unique_value()),
    }


def network_of_file(model: Any) -> dict[str, Tensor]:
    """The weights of a MODEL's network as in its file, without any LoRA that is currently merged into them."""
    start, contents = "diffusion_model.", contents_of_file(model)
    return {name.removeprefix(start): value for name, value in contents.items() if name.startswith(start)}


def check_base(recorded: dict[str, str], model: Any, what: str = "artifact", made: str = "trained on") -> None:
    """ValueError when an artifact cannot belong to this model; logs a warning when only the weights differ."""
    if not recorded:
        log.warning("The %s does not record its base model, so it was not checked.", what)
        return
    current = fingerprint(model)
    for name in FIXED:
        if current[name] and recorded.get(name) not in ("", current[name]):
            raise ValueError(
                f"The {what} was made for {recorded.get('family')} ({recorded.get('prediction')}), the connected "
                f"model is {current['family']} ({current['prediction']}), and their {name.replace('_', ' ')} differ: "
                f"connect the model it was {made}."
            )
    if recorded.get("shapes") != current["shapes"]:
        log.info("A quantised model hides its weights, so that the %s could not be compared with them.", what)
    elif recorded.get("content") != current["content"]:
        log.warning(
            "The %s was %s other weights of the same family (%s): the likeness may suffer.",
            what,
            made,
            current["family"],
        )


def patches_digest(model: Any) -> str:
    """A hash of everything on top of the weights: LoRAs, patches, wrappers, hooks, attachments and options.

    The pack's own guidance and what lives in sampling steps are excluded: training uses neither (see trainable_clone).
    """
    wrappers = getattr(model, "wrappers", {})
    of_sampling = sampling_keys(wrappers)
    names = ("object_patches", "hook_patches", "attachments")
    parts = {name: getattr(model, name, None) for name in (*PATCHER, *names)}
    parts["object_patches"] = uncompiled(parts["object_patches"] or {})
    parts["additional_models"] = _without_guidance(getattr(model, "additional_models", {}))
    for name in ("wrappers", "callbacks"):
        kinds = {kind: _without_guidance(by_key, of_sampling) for kind, by_key in getattr(model, name, {}).items()}
        parts[name] = {kind: by_key for kind, by_key in kinds.items() if by_key}
    options = {name: value for name, value in model.model_options.items() if name not in (NOTES, WINDOWS)}
    # Such wrappers keep their state in the transformer options: objects of their own module.
    functions = (each for by_key in wrappers.values() for key in of_sampling & by_key.keys() for each in by_key[key])
    modules = {getattr(function, "__module__", None) for function in functions}
    inner = options.get("transformer_options", {}).items()
    options["transformer_options"] = {name: each for name, each in inner if type(each).__module__ not in modules}
    return digest([describe(parts), describe(options)])


def _without_guidance(by_key: dict[Any, Any], others: Collection[Any] = ()) -> dict[Any, Any]:
    return {key: value for key, value in by_key.items() if value and not is_pack_guidance(key) and key not in others}


def precision(model: Any) -> list[str]:
    """The dtypes in which a model's weights are stored and in which it computes."""
    # Not the attribute itself: a training's clone, which may still be loaded, sets its own on the shared model.
    has = "manual_cast_dtype" in model.object_patches or hasattr(model.model, "manual_cast_dtype")
    cast = model.get_model_object("manual_cast_dtype") if has else None
    return [str(model.model_dtype()), str(cast)]
