"""Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) from its authors' package, which is optional."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...vision.host.extras.offline import missing_package

# As in common LoRA training scripts, including SISO's.
SAFEGUARDS = {"use_bias_correction": True, "safeguard_warmup": True}


def prodigy() -> Callable[..., Any]:
    """The optimiser's class; all parameter groups must share one learning rate. RuntimeError without the package."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise missing_package("Prodigy", "prodigyopt", error, "prodigyopt", " (or choose AdamW)") from error
    return functools.partial(Prodigy, **SAFEGUARDS)
