"""Which base model an artifact was made for."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..fit.runs import digest
from .describe import PATCHER, contents_of_file, describe, sampled, unlike_any
from .weights import is_own_guidance

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
    """Family, prediction type, latent format and UNet shapes must match; a hash of 16 weights should.

    The shapes are empty where layers pack or hide their weights: a file's quantised form is told apart from it by the
    hash, for the key of a run, but is not compared with it.
    """
    base = model.model
    state = network_of_file(model)
    own = (name for name in state if name.rpartition(".")[2] not in QUANTISED)  # a quantised file is the same model
    shapes = {name: list(state[name].shape) for name in own}
    weights = {name: value for name, value in state.items() if value.ndim >= 2 and name.endswith(".weight")}
    shown = bool(weights) and all(value.is_floating_point() and not value.is_meta for value in weights.values())
    return {
        "family": type(base.model_config).__name__,
        "prediction": base.model_type.name,
        "latent_format": type(base.latent_format).__name__,
        "shapes": digest(shapes) if shown else "",
        "content": digest(sampled(weights) or unlike_any()),
    }


def network_of_file(model: Any) -> dict[str, Tensor]:
    """What the file holds of a MODEL's network, whatever LoRA is written into it now."""
    start, found = "diffusion_model.", contents_of_file(model)
    return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}


def check_base(recorded: dict[str, str], model: Any, what: str = "artifact", made: str = "trained on") -> None:
    """ValueError when an artifact cannot belong to this model; a warning when only the weights differ."""
    if not recorded:
        log.warning("The %s does not record its base model, so it was not checked.", what)
        return
    found = fingerprint(model)
    known = [name for name in FIXED if "" not in (recorded.get(name), found[name])]
    for name in known:
        if recorded.get(name) != found[name]:
            raise ValueError(
                f"The {what} was made for {recorded.get('family')} ({recorded.get('prediction')}), the connected "
                f"model is {found['family']} ({found['prediction']}), and their {name.replace('_', ' ')} differ: "
                f"connect the model it was {made}."
            )
    if recorded.get("shapes") != found["shapes"]:
        log.info("A quantised model hides its weights, so that the %s could not be compared with them.", what)
    elif recorded.get("content") != found["content"]:
        log.warning(
            "The %s was %s other weights of the same family (%s): the likeness may suffer.",
            what,
            made,
            found["family"],
        )


def patches_digest(model: Any) -> str:
    """A hash of all that lies on top of the weights: LoRAs, patches, wrappers, hooks, attachments and options.

    Our own guidance is left out: it is no part of what is trained (see trainable_clone).
    """
    parts = ("object_patches", "hook_patches", "attachments")
    found = {part: getattr(model, part, None) for part in (*PATCHER, *parts)}
    found["additional_models"] = _without_guidance(getattr(model, "additional_models", {}))
    for part in ("wrappers", "callbacks"):
        kinds = {kind: _without_guidance(by_key) for kind, by_key in getattr(model, part, {}).items()}
        found[part] = {kind: by_key for kind, by_key in kinds.items() if by_key}
    return digest([describe(found), describe(model.model_options)])


def _without_guidance(by_key: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in by_key.items() if not is_own_guidance(key) and value}


def precision(model: Any) -> list[str]:
    """The precisions that a model's weights are stored in and that it computes in."""
    stored = model.model_dtype() if hasattr(model, "model_dtype") else None
    cast = getattr(model.model, "manual_cast_dtype", None)
    return [str(stored), str(model.object_patches.get("manual_cast_dtype", cast))]
