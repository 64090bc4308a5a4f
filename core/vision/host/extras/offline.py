"""Loading other libraries' models without any network access, and without touching the global random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hub access off (huggingface_hub's own switch), ordinary tensors, no gradients, random state as it was before."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    try:
        hub.HF_HUB_OFFLINE = True
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        hub.HF_HUB_OFFLINE = before


def reason(error: BaseException) -> str:
    """The first line of an error, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
