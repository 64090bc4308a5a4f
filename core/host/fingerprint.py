"""Which base model an artifact was made for."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..runs import digest

SAMPLED_TENSORS = 16
SAMPLED_ELEMENTS = 1 << 16
log = logging.getLogger("likeness")
FIXED = ("family", "prediction", "latent_format", "shapes")


def fingerprint(model: Any) -> dict[str, str]:
    """family, prediction type, latent format and UNet shapes, which must match; and a hash of 16 weights, which
    should.
    """
    base = model.model
    state = base.diffusion_model.state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    return {
        "family": type(base.model_config).__name__,
        "prediction": base.model_type.name,
        "latent_format": type(base.latent_format).__name__,
        "shapes": digest(shapes),
        "content": digest(_sampled_weights(model, state)),
    }


def _sampled_weights(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The beginnings of 16 weight matrices as they are in the file: unpatched, and as float32 whatever they are
    stored in.
    """
    names = sorted(name for name, value in state.items() if value.ndim >= 2 and name.endswith(".weight"))
    chosen = names[:: max(1, len(names) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    weights = {}
    for name in chosen:
        backup = model.backup.get(f"diffusion_model.{name}")
        value = state[name] if backup is None else backup.weight
        weights[name] = value.detach().flatten()[:SAMPLED_ELEMENTS].float().cpu()
    return weights


def check_base(recorded: dict[str, str], model: Any) -> None:
    """ValueError when an artifact cannot belong to this model; a warning when only the weights differ (another
    fine-tune).
    """
    if not recorded:
        log.warning("The artifact does not record its base model, so it was not checked.")
        return
    found = fingerprint(model)
    for name in FIXED:
        if recorded.get(name) != found[name]:
            raise ValueError(
                f"The artifact was made for {recorded.get('family')} ({recorded.get('prediction')}), the connected "
                f"model is "
                f"{found['family']} ({found['prediction']}), and their {name.replace('_', ' ')} differ: "
                "connect the model it was trained on."
            )
    if recorded.get("content") != found["content"]:
        log.warning(
            "The artifact was trained on other weights of the same family (%s): the likeness may suffer.",
            found["family"],
        )


def patches_digest(model: Any) -> str:
    """A hash of what was put on top of the weights (LoRA and the like) and of the model options, as far as they
    have names.
    """
    patches = {key: [_plain(patch) for patch in entries] for key, entries in model.patches.items()}
    options = {name: sorted(map(str, value)) for name, value in _names(model.model_options)}
    return digest({"patches": patches, "options": options})


def _names(options: dict[str, Any]) -> list[tuple[str, Any]]:
    transformer = options.get("transformer_options", {})
    named = [
        (f"{kind}.{name}", entries)
        for kind in ("patches", "patches_replace")
        for name, entries in transformer.get(kind, {}).items()
    ]
    return [(name, entries if isinstance(entries, dict) else [len(entries)]) for name, entries in named]


def _plain(value: Any) -> Any:
    """Tensors, numbers and names out of a weight patch; adapters are known by their weights."""
    if isinstance(value, Tensor):
        return value.detach().flatten()[:SAMPLED_ELEMENTS].float().cpu()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "weights"):
        return [type(value).__name__, _plain(value.weights)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
