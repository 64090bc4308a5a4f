"""The presets of Optimize LoRA. How an image is sampled (sigmas, cfg, grad_steps) stays as it is on the node.

published: the authors' settings for SDXL-turbo on models that add noise, for FLUX.1-schnell on flow models; siso.py
names the sources.

fast: half of the published images at 1.5 times their rate, the winner of a search (benchmarks/results/search_siso.json)
on the toyworld's student of one step. Against 50 images (fast_siso.json, 24 other subjects) identity differs by -0.006
(-0.055 to 0.049), text by 0.018 (-0.011 to 0.052), with 23 images drawn instead of 35 before a run stops by itself. The
student's rate is twenty times SDXL-turbo's: what is carried over is the factor. With a new noise in every iteration 25
images were not shown to be as good at any rate, so that the noise stays. Nothing was searched for flow models, for
several steps, or for edits.
"""

from ..fit.presets import FAST, FLOW, NOISE, PUBLISHED, Presets
from . import siso

SAME, NEW = "same", "new"  # whether every iteration has the seed's noise, or one of its own
_PUBLISHED = {
    "iterations": siso.ITERATIONS,
    "learning_rate": 2e-4,
    "rank": siso.RANK,
    "weight_decay": 1e-2,
    "text_rate": 2e-4,
    "text_decay": 1e-2,
    "threshold": siso.THRESHOLD,
    "patience": siso.PATIENCE,
    "optimizer": "AdamW",
    "noise": SAME,
}
_FLUX = {**_PUBLISHED, "weight_decay": 1e-4, "text_rate": 5e-6, "text_decay": 1e-3}
_FAST = {"iterations": siso.ITERATIONS // 2, "learning_rate": 3e-4, "optimizer": "AdamW", "noise": SAME}

SISO: Presets = {PUBLISHED: {NOISE: _PUBLISHED, FLOW: _FLUX}, FAST: {NOISE: _FAST}}
