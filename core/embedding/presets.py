"""The presets of Train Subject Embedding.

published: HiPer's own settings, whose sources hiper.py names, on every model; what a node adds to HiPer is off.

fast: the winner of a search (benchmarks/results/search_hiper.json) for models that add noise to the latent (SD1.x to
SDXL): a learning rate of 0.04 for 300 steps, on the timesteps from 150 to 850. Against published (fast_hiper.json, 24
other subjects of the toyworld) identity is higher by 0.120 (0.067 to 0.176), text by 0.000 (-0.025 to 0.024). On flow
models the rate is 0.03 of the size of the prompt's numbers, since these differ widely between text encoders (sixtyfold
between the toyworld's two) and Adam moves each number by about the rate: 0.6 on the toyworld's, where published learns
next to nothing in its 1000 steps. There identity is higher by 0.336 (0.239 to 0.436), text lower by 0.049 (0.017 to
0.083; fast_hiper_flow.json, 16 subjects). save_every, init and the anchor stay as they are on the node, so that HiFi
Tuner's first stage can use it.
"""

from torch import Tensor

from ..fit.presets import FAST, FLOW, NOISE, PUBLISHED, Presets
from ..prompt.conditioning import size_of
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
FAST_HIPER = {
    "steps": 300,
    "learning_rate": 0.04,
    "tokens": hiper.TOKENS,
    "start_percent": 0.15,
    "end_percent": 0.85,
}
_SHARE = 0.03  # of the size of the prompt's numbers: the learning rate of fast on flow models


def presets_for(rows: Tensor) -> Presets:
    """The presets for a source prompt's tokens [1, N, d]."""
    rate = float(f"{_SHARE * size_of(rows):.1e}")  # two digits
    flow = {**FAST_HIPER, "learning_rate": rate, "start_percent": 0.0, "end_percent": 1.0}
    return {PUBLISHED: {NOISE: _PUBLISHED, FLOW: _PUBLISHED}, FAST: {NOISE: FAST_HIPER, FLOW: flow}}
