"""Predictions that make a sampling land on given latents (see rectify.py): a function after CFG, on a MODEL's clone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...session.weights import GUIDANCE_PREFIX, POST_CFG, Playback
from ..rectify import CLOSE, landing, step_at

KEY = f"{GUIDANCE_PREFIX}.landing"
log = logging.getLogger("likeness")


@dataclass(frozen=True, eq=False)
class Landing(Playback):
    """targets: step -> the latent [B, C, h, w] to have after it, in the model's latent space. levels: the sampling's
    noise levels, falling. mask [1, 1, h, w]: where it holds; None everywhere. rows: how many rows of the latent batch,
    from the first on; None for all.
    """

    targets: dict[int, Tensor]
    levels: tuple[float, ...]
    mask: Tensor | None = None
    rows: int | None = None

    def __deepcopy__(self, _memo: dict) -> Landing:
        return self  # every clone of a MODEL copies its options deeply; these latents never change

    def __call__(self, args: dict[str, Any]) -> Tensor:
        denoised, sigma = args["denoised"], float(args["sigma"].max())
        step = step_at(sigma, self.levels)
        if step is None or step not in self.targets:
            return denoised
        x, target = args["input"][: self.rows], self.targets[step].to(denoised)
        wanted = landing(x, sigma, target, self.levels[step + 1])
        if self.mask is not None:
            wanted = wanted.where(self.mask.to(x) > 0.5, denoised[: self.rows])
        found = denoised.clone()
        found[: self.rows] = wanted
        return found

    def check(self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *more, **named) -> Any:
        """Around a whole sampling: refuse latents that the targets do not fit, before the model is loaded; and have the
        last word after CFG, also behind nodes that were connected later.
        """
        target = next(iter(self.targets.values()))
        if noise.shape[1:] != target.shape[1:] or noise.shape[0] < (self.rows or 1):
            raise ValueError(
                f"The latent to sample is {tuple(noise.shape)}, this model lands on the latents of an inverted image "
                f"{tuple(target.shape)}: sample the latent that came with it, or connect the model from before."
            )
        strange = [s for s in sigmas.tolist()[:-1] if not any(abs(s - level) <= CLOSE * level for level in self.levels)]
        if strange:
            log.warning(
                "The sampling has noise levels that the inversion had not (%.4g): connect the SIGMAS of Invert "
                "Image, or the image will be met only roughly.",
                strange[0],
            )
        options = executor.class_obj.model_options  # this run's own
        options[POST_CFG] = [*(each for each in options.get(POST_CFG, []) if each is not self), self]
        return executor(noise, latent, sampler, sigmas, *more, **named)


def landed(model: Any, target: Landing) -> Any:
    """A clone of the MODEL that lands on the targets; landings that were on it are replaced."""
    clone = model.clone()
    drop_landing(clone)
    clone.set_model_sampler_post_cfg_function(target)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, target.check)
    return clone


def drop_landing(clone: Any) -> None:
    """Take a landing off a clone that is the caller's own."""
    others = [function for function in clone.model_options.get(POST_CFG, []) if not isinstance(function, Landing)]
    clone.model_options.pop(POST_CFG, None)
    if others:
        clone.model_options[POST_CFG] = others
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
