"""Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) from its authors' package, which is optional."""

import functools
from collections.abc import Callable
from typing import Any

from ...vision.host.extras.offline import package

# As in common LoRA training scripts, including SISO's.
SAFEGUARDS = {"use_bias_correction": True, "safeguard_warmup": True}


def prodigy() -> Callable[..., Any]:
    """The optimiser's class; all parameter groups must share one learning rate. RuntimeError without the package."""
    library = package("prodigyopt", "Prodigy", "prodigyopt", " (or choose AdamW)")
    return functools.partial(library.Prodigy, **SAFEGUARDS)
