"""SINE (Zhang et al. 2022, arXiv 2212.04489), eq. 3: guidance by models that were tuned on one image.

In the part of the denoising where t > K, classifier-free guidance takes, in place of the base model's conditional
prediction, a mix of it with the prediction of a tuned model for the tuned model's own training prompt:

    eps~ = eps_u + w (v eps_c + (1 - v) eps^ - eps_u)

and where t <= K it is left alone. eps_c and eps_u are the base model's, for the edit prompt and the negative prompt;
the tuned model's own unconditional prediction appears nowhere. With several tuned models (the authors' multi-model
script) each has its weight beta_i and its window, and the base keeps 1 - sum of the active beta_i; one model with
beta = 1 - v is eq. 3.

The mix is made of denoised predictions D. At one (x, sigma), D = a x + b P for every kind of prediction P, so with
weights that sum to 1 the mix of D is the D of the mixed P: for eps, v and flow models alike. K is a noise level here:
samplers that evaluate between their steps stay inside the window.

Source: ldm/models/diffusion/guidance_ddim.py of the authors. Deviations, each with its reason:
- predictions that eq. 3 does not use are not computed (theirs are 4 evaluations a step, here 3 and then 2);
- cfg 1 works, theirs fails there;
- the window is open at K as in the paper (t > K); their script includes the end, which its own steps never meet.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BASE_WEIGHT = 0.7  # v, section 4.1 of the paper; the authors' README has 0.4 with K 500 and a cfg of 10
END_PERCENT = 0.6  # K = 400 of 1000 timesteps
CFG = 7.5
SAMPLING_STEPS = 100
LAST_TIMESTEP = 999  # timesteps are 0 .. 999 in SD; percent 0 of the sampling is the last one


def percent_of(timestep: float) -> float:
    """The part of the sampling that is done at a training timestep K: 0.5996 for K = 400."""
    return 1.0 - timestep / LAST_TIMESTEP


def check_weights(weights: Sequence[float], allow_over_one: bool) -> None:
    """ValueError for weights whose sum leaves the base model less than nothing."""
    total = sum(weights)
    if total > 1 + 1e-6 and not allow_over_one:
        raise ValueError(
            f"The tuned models' weights {', '.join(f'{weight:g}' for weight in weights)} add up to {total:g}, which "
            f"leaves the base model {1 - total:g}: lower them to a sum of 1 or less, or switch allow_over_one on."
        )


def base_share(weights: Sequence[float]) -> float:
    """1 - sum beta_i, exactly 0 where rounding alone keeps it from 0."""
    rest = 1.0 - sum(weights)
    return 0.0 if abs(rest) < 1e-6 else rest


def mixed(base: Tensor | None, tuned: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(1 - sum beta_i) D_c + sum beta_i D_i in float32, as base has it; base may be None where its share is 0.

    All [B, C, h, w]: the denoised predictions for the edit prompt and for the training prompts, weights the active
    beta_i.
    """
    parts = [weight * prediction.float() for weight, prediction in zip(weights, tuned, strict=True)]
    if base is not None:
        parts.insert(0, base_share(weights) * base.float())
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(tuned[0].dtype)
