"""Make a sampling reach given latents (see rectify.py) with a post-CFG function on a clone of a MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...session.weights import GUIDANCE_PREFIX, POST_CFG, Playback
from ..rectify import CLOSE, landing_prediction, step_at

KEY = f"{GUIDANCE_PREFIX}.landing"
log = logging.getLogger("likeness")


@dataclass(frozen=True, eq=False)
class Landing(Playback):
    """A post-CFG function that pins a sampling to latents. targets: step -> the latent [B, C, h, w] after it, in the
    model's latent space. levels: the sampling's noise levels, descending. mask [1, 1, h, w]: where it applies; None for
    everywhere. rows: the number of rows of the latent batch it applies to, from the first on; None for all. residuals:
    step -> what the model sees all rows moved by (DirectEdit).
    """

    targets: dict[int, Tensor]
    levels: tuple[float, ...]
    mask: Tensor | None = None
    rows: int | None = None
    residuals: dict[int, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, _memo: dict) -> Landing:
        return self  # cloning a MODEL deep-copies its options; these latents never change

    def __call__(self, args: dict[str, Any]) -> Tensor:
        denoised, sigma = args["denoised"], float(args["sigma"].max())
        step = step_at(sigma, self.levels)
        if step is None or step not in self.targets:
            return denoised
        x, target = args["input"][: self.rows], self.targets[step].to(denoised)
        prediction = landing_prediction(x, sigma, target, self.levels[step + 1])
        if self.mask is not None:
            prediction = prediction.where(self.mask.to(x) > 0.5, denoised[: self.rows])
        result = denoised.clone()
        result[: self.rows] = prediction
        return result

    def moved(self, executor: Any, model: Any, conds: Any, x: Tensor, sigma: Tensor, *more: Any) -> list[Tensor]:
        """Wrapper around the predictions for all prompts: D(x + r) - r, whose Euler step from x is that of x + r."""
        step = step_at(float(sigma.max()), self.levels)
        if step not in self.residuals:
            return executor(model, conds, x, sigma, *more)
        of_image = self.residuals[step].to(x)
        residual = of_image[torch.arange(len(x)) % len(of_image)]
        return [each - residual for each in executor(model, conds, x + residual, sigma, *more)]

    def check(self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *more, **named) -> Any:
        """Wrapper around a whole sampling: rejects latents that do not fit the targets before the model is loaded, and
        makes this the last post-CFG function, even after those of nodes connected later.
        """
        target = next(iter(self.targets.values()))
        if noise.shape[1:] != target.shape[1:] or noise.shape[0] < (self.rows or 1):
            raise ValueError(
                f"The latent to sample is {tuple(noise.shape)}, this model lands on the latents of an inverted image "
                f"{tuple(target.shape)}: sample the latent that came with it, or connect the model from before."
            )
        unknown = [s for s in sigmas.tolist()[:-1] if not any(abs(s - level) <= CLOSE * level for level in self.levels)]
        if unknown:
            log.warning(
                "The sampling has noise levels that the inversion did not have (%.4g): connect the SIGMAS of Invert "
                "Image, or the image will be met only roughly.",
                unknown[0],
            )
        options = executor.class_obj.model_options  # belong to this run
        options[POST_CFG] = [*(each for each in options.get(POST_CFG, []) if each is not self), self]
        return executor(noise, latent, sampler, sigmas, *more, **named)


def attach_landing(model: Any, landing: Landing) -> Any:
    """A clone of the MODEL with the Landing attached, in place of any other Landing on it."""
    clone = model.clone()
    others = [function for function in clone.model_options.get(POST_CFG, []) if not isinstance(function, Landing)]
    clone.model_options[POST_CFG] = [*others, landing]
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, landing.check)
    if landing.residuals:
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, landing.moved)
    return clone
