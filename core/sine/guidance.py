"""SINE (Zhang et al. 2022, arXiv 2212.04489), eq. 3: guidance by models fine-tuned on one image.

While t > K, classifier-free guidance replaces the base model's conditional prediction by a mix of it and a fine-tuned
model's prediction for that model's training prompt:

    eps~ = eps_u + w (v eps_c + (1 - v) eps^ - eps_u)

For t <= K it is unchanged. eps_c and eps_u are the base model's, for the edit prompt and the negative prompt; the
fine-tuned model's unconditional prediction is unused. With several fine-tuned models (the reference code's multi-model
script) each has its weight beta_i and its window, and the base keeps 1 - sum of the active beta_i; one model with
beta = 1 - v is eq. 3.

The mix is computed on denoised predictions D. At one (x, sigma), D = a x + b P for every prediction type P, so with
weights that sum to 1 the mix of D is the D of the mixed P, for eps, v and flow models. K is a noise level here, so
samplers that evaluate between their steps stay inside the window.

Source: ldm/models/diffusion/guidance_ddim.py of the reference code. Deviations, each with its reason:
- predictions that eq. 3 does not use are not computed (the reference code has 4 evaluations per step, here 3, then 2);
- cfg 1 works; the reference code fails there;
- the window is open at K as in the paper (t > K); the reference script includes the end, which its own steps never hit.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

BASE_WEIGHT = 0.7  # v, section 4.1 of the paper; the reference README has 0.4 with K 500 and a cfg of 10
END_PERCENT = 0.6  # K = 400 of 1000 timesteps
CFG = 7.5
LAST_TIMESTEP = 999  # timesteps are 0 .. 999 in SD; percent 0 of the sampling is timestep 999


def percent_of(timestep: float) -> float:
    """The fraction of the sampling completed at a training timestep K: 0.5996 for K = 400."""
    return 1.0 - timestep / LAST_TIMESTEP


def check_weights(weights: Sequence[float], allow_over_one: bool) -> None:
    """ValueError for weights that sum to more than 1, which leaves the base model a negative share."""
    total = sum(weights)
    if total > 1 + 1e-6 and not allow_over_one:
        raise ValueError(
            f"The tuned models' weights {', '.join(f'{weight:g}' for weight in weights)} add up to {total:g}, which "
            f"leaves the base model {1 - total:g}: lower them to a sum of 1 or less, or switch allow_over_one on."
        )


def base_share(weights: Sequence[float]) -> float:
    """1 - sum beta_i, exactly 0 where it differs from 0 by rounding only."""
    rest = 1.0 - sum(weights)
    return 0.0 if abs(rest) < 1e-6 else rest


def mix_predictions(base: Tensor | None, tuned: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(1 - sum beta_i) D_c + sum beta_i D_i, computed in float32; base may be None if its share is 0.

    base and tuned: denoised predictions [B, C, h, w] for the edit prompt and the training prompts; weights: the active
    beta_i. The result has the dtype of the predictions.
    """
    parts = [weight * prediction.float() for weight, prediction in zip(weights, tuned, strict=True)]
    if base is not None:
        parts.insert(0, base_share(weights) * base.float())
    return functools.reduce(torch.add, parts).to(tuned[0].dtype)
