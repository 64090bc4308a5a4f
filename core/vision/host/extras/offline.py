"""Use other libraries' models without network access and without changing the global random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hub access disabled (huggingface_hub's own switch), normal tensors, no gradients, random state restored."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    try:
        hub.HF_HUB_OFFLINE = True
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        hub.HF_HUB_OFFLINE = before


def reason(error: BaseException) -> str:
    """The first line of an error, shortened for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
