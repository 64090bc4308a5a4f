"""Apply a fine-tune to a MODEL and a CLIP with ComfyUI's own LoRA loading, and with the mask that a T-LoRA needs."""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from torch import Tensor, nn

from ...prompt.conditioning import Conditioning, detached
from ..artifact import MODEL_PREFIXES, TEXT_PREFIXES, FineTunedWeights
from ..low_rank import attached_lora, low_rank_product
from ..timestep_rank import MARKER, active_ranks

RANK_MASK = "likeness.rank_mask"  # key of the wrappers
UP = ".lora_up.weight"
log = logging.getLogger("likeness")


def apply_lora(tuned: FineTunedWeights, model: Any, clip: Any | None, strength: float) -> tuple[Any, Any | None]:
    """The fine-tuned MODEL and CLIP; the inputs are not changed. Strength 0 returns them as they are."""
    if strength == 0.0:
        return model, clip
    if clip is None and tuned.part(TEXT_PREFIXES):
        log.warning("The fine-tune has a text encoder too: connect a CLIP, or its prompt will not show the subject.")
    _check_fits(tuned.part(MODEL_PREFIXES), model.model, comfy.lora.model_lora_keys_unet(model.model, {}))
    patched, _ = comfy.sd.load_lora_for_models(model, None, tuned.part(MODEL_PREFIXES), strength, 0.0)
    if MARKER in tuned:
        with torch.inference_mode(False):
            parts = detached(tuned.part(MODEL_PREFIXES))
        paths = [name.removesuffix(UP) for name in parts if name.endswith(UP)]
        mask = RankMask({path: (parts[path + UP], parts[f"{path}.lora_down.weight"]) for path in paths}, strength)
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, RANK_MASK, mask)
    if clip is not None:
        encoder = clip.cond_stage_model
        _check_fits(tuned.part(TEXT_PREFIXES), encoder, comfy.lora.model_lora_keys_clip(encoder, {}))
        _, clip = comfy.sd.load_lora_for_models(None, clip, tuned.part(TEXT_PREFIXES), 0.0, strength)
    return patched, clip


@dataclass(frozen=True)
class RankMask:
    """A wrapper of the network that takes away what the masked ranks of a T-LoRA add: loaded weights hold all ranks.

    factors: B and A of each layer, by its path in the model.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    strength: float

    def __call__(self, executor: Any, x: Tensor, sigma: Tensor, *args: Any, **more: Any) -> Tensor:
        layers, levels = dict(executor.class_obj.named_modules()), executor.class_obj.model_sampling.sigmas
        t, masked = int((levels.to(sigma) - sigma.max()).abs().argmin()), {}
        for name, (up, down) in self.factors.items():
            first = 2 * active_ranks(t, len(levels), len(down) // 2)
            masked[name] = functools.partial(low_rank_product, up=-self.strength * up[:, first:], down=down[first:])
        with attached_lora(layers, {name: each for name, each in masked.items() if name in layers}):
            return executor(x, sigma, *args, **more)


def _check_fits(weights: dict[str, Tensor], module: nn.Module, keys: dict[str, Any]) -> None:
    """ValueError for the weights of another model, which ComfyUI leaves out with a line in the log.

    keys: from the names of layers in LoRA files to the module's weights, or to a part of one.
    """
    own, patches = module.state_dict(), comfy.lora.load_lora(weights, keys, log_missing=False)
    for target, patch in patches.items():
        name, part = (target, None) if isinstance(target, str) else target[:2]
        count, weight = _count(patch), own.get(name, torch.empty(0))
        expected = weight.numel() if part is None else weight.numel() // weight.shape[part[0]] * part[2]
        if count not in (None, expected) and weight.is_floating_point():  # others are packed
            raise ValueError(
                f"The fine-tune has {count} numbers for '{name}', this model {expected}: connect the model that it "
                "was trained on."
            )
    if weights and not patches:
        raise ValueError(
            f"The fine-tune is for layers that this model does not have, such as '{next(iter(weights))}': connect the "
            "model that it was trained on."
        )


def _count(patch: Any) -> int | None:
    """How many numbers a patch changes; None for kinds that this pack does not make, whose sizes ComfyUI checks."""
    if isinstance(patch, tuple):  # a difference
        return patch[1][0].numel()
    one, other, _alpha, *more = patch.weights
    if isinstance(patch, LoRAAdapter) and more[0] is None:
        return one.shape[0] * other[0].numel()
    whole = isinstance(patch, LoKrAdapter) and isinstance(one, Tensor) and isinstance(other, Tensor)
    return one.numel() * other.numel() if whole else None


def encode_prompt(clip: Any, prompt: str) -> Conditioning:
    """The output of the stock Text Encode node."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
