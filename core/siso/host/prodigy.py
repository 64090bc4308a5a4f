"""Prodigy (Mishchenko and Defazio 2023, arXiv 2306.06101) from its authors' package, which is optional."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...vision.host.extras.install import missing_package

# As the LoRA scripts of the field have it, SISO's among them.
SAFEGUARDS = {"use_bias_correction": True, "safeguard_warmup": True}


def prodigy() -> Callable[..., Any]:
    """The optimiser's class; all its groups must have one learning rate. RuntimeError when the package is missing."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise missing_package("Prodigy", "prodigyopt", error, "prodigyopt", " (or choose AdamW)") from error
    return functools.partial(Prodigy, **SAFEGUARDS)
