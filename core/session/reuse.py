"""Notice what uses an earlier step again: in an optimization or inversion it gives wrong results, or no gradient.

ComfyUI's own step caches are known by what they wrap and are left out (weights.py). Those of other packs may replace
the network's call, its blocks or its methods, so the network is watched: in a step that is like the one before, a cache
runs fewer of its layers, and all of them after another one.
"""

from typing import Any

import torch
from torch import Tensor

from .weights import calls

OWN = "likeness."  # keys of the pack's own wrappers, which compute every step
PACK = __name__.removesuffix("core.session.reuse")  # what the names of its modules begin with
OBJECTS = ("model_sampling", "latent_format", "manual_cast_dtype")  # object patches that are no part of the network
FAR = 10.0  # times the noise of the highest level: like no step
STEPS = 3  # like each other; a cache may need some to begin
SAME = 5  # times the same step: a cache that counts steps computes each second or third, up to each fifth


def may_reuse(model: Any) -> bool:
    """Whether something on a MODEL, or in its network, could compute in the network's place."""
    options = model.model_options
    foreign = [key for keys in model.wrappers.values() for key in keys if not str(key).startswith(OWN)]
    attached = [options.get("model_function_wrapper"), foreign, model.object_patches.keys() - set(OBJECTS)]
    if any(attached) or not _is_own(options.get("transformer_options", {})):
        return True
    return any("forward" in vars(part) for part in model.model.diffusion_model.modules())


def _is_own(value: Any) -> bool:
    """Whether all that a table of patches holds is the pack's own."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_is_own, value.values() if isinstance(value, dict) else value))
    return str(getattr(value, "__module__", "")).startswith(PACK)


def check_reuse(model: Any, denoiser: Any, x0: Tensor) -> None:
    """RuntimeError when a prediction needs fewer calls of the network's layers because of the ones before it."""
    if not may_reuse(model):
        return
    last = denoiser.sigmas.shape[0] - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    far = FAR * float(denoiser.sigmas[-1]) * noise

    def count(index: int, x: Tensor) -> int:
        ids: list[int] = []
        with torch.no_grad(), calls([model.model.diffusion_model], ids.append):
            denoiser.denoised(x, denoiser.sigmas[index].to(x).view(1))
        return len(ids)

    count(last, far)  # nothing is like what was sampled before
    again = [count(last // 2, x0) for _ in range(SAME)]
    count(last, far)
    first, *others = (count(last // 2 - step, x0) for step in range(STEPS))
    fewer = min(others) < first
    if fewer:
        count(last, far)
        step = 1 + others.index(min(others))
        fewer = count(last // 2 - step, x0) > min(others)  # else the noise level alone decides it, as some patches do
    if fewer or min(again) < max(again):
        raise RuntimeError(
            "This model uses an earlier step again (a step cache, such as TeaCache), expected is one that computes "
            "each step: connect the model before that node; it may follow for sampling."
        )
