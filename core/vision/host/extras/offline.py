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


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """ValueError when a network of another library cannot be run: what its folder says of it may fit its weights and
    still not work.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be run ({reason(error)}): its settings are not those of its weights, copy the whole folder "
            "again."
        ) from error


def reason(error: BaseException) -> str:
    """The first line of an error, shortened for use inside a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
