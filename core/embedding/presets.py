"""The presets of Train Subject Embedding.

published: HiPer's own settings, whose sources hiper.py names, on every model; what a node adds to HiPer is off.

fast: the winner of a search (benchmarks/results/search_hiper.json) for models that add noise to the latent (SD1.x to
SDXL): a learning rate of 0.04 for 300 steps, on the timesteps from 150 to 850. Against published (fast_hiper.json, 24
other subjects of the toyworld) identity is higher by 0.120 (0.067 to 0.176), text by 0.000 (-0.025 to 0.024). Nothing
was searched for flow models, whose tokens have other sizes. save_every, init and the anchor stay as they are on the
node, so that HiFi Tuner's first stage can use it.
"""

from __future__ import annotations

from ..fit.presets import FAST, FLOW, NOISE, PUBLISHED, Presets
from . import hiper

SOURCE, EMPTY = "source prompt", "empty prompt"  # where the tokens start
_PUBLISHED = {
    "steps": hiper.STEPS,
    "learning_rate": hiper.LEARNING_RATE,
    "tokens": hiper.TOKENS,
    "save_every": hiper.SAVE_EVERY,
    "init": SOURCE,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "anchor_weight": 0.0,
}
_FAST = {
    "steps": 300,
    "learning_rate": 0.04,
    "tokens": hiper.TOKENS,
    "start_percent": 0.15,
    "end_percent": 0.85,
}

HIPER: Presets = {PUBLISHED: {NOISE: _PUBLISHED, FLOW: _PUBLISHED}, FAST: {NOISE: _FAST}}
