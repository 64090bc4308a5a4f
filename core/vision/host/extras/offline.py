"""Other libraries: without network access or a change of the random state, their files, and what to install."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ....session.weights import replaced


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Hub access disabled (huggingface_hub's own switch), normal tensors, no gradients, random state restored."""
    import huggingface_hub.constants as hub

    with replaced(hub, HF_HUB_OFFLINE=True), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng([]):
        yield


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


def weights_variant(folder: Path, base: str = "model", variants: Sequence[str | None] = (None,)) -> str | None:
    """The variant of the weight files in a folder, such as "fp16". ValueError when it has none, or only pickles."""
    for variant in variants:
        middle = "" if variant is None else f".{variant}"
        names = (f"{base}{middle}.safetensors", f"{base}.safetensors.index{middle}.json")
        if any((folder / name).is_file() for name in names):
            return variant
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(suffix))
    problem = f"has its weights as {pickles[0]}, a pickle, which can run code" if pickles else "has no weights"
    where = f"{folder.parent.name}/{folder.name}"
    raise ValueError(f"The folder {where} {problem}: put the model's {base}.safetensors there.")


def package(module: str, what: str, asked: str, otherwise: str = "") -> Any:
    """Another library, which `what` needs. RuntimeError, as of missing_package(), when it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_package(what, asked.removesuffix("_torch"), error, asked, otherwise) from error


def missing_package(what: str, package: str, why: object, asked: str, otherwise: str = "") -> RuntimeError:
    """A RuntimeError with the pip command that installs `asked`. The command uses the running Python's path: ComfyUI's
    portable and desktop versions bring their own Python, into which a bare `pip` does not install.
    """
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    terminal = "the Command Prompt (cmd)" if sys.platform == "win32" else "a terminal"  # PowerShell runs no quoted path
    command = f"`{python} -m pip install {asked}` in {terminal}{otherwise}, and restart ComfyUI"
    return RuntimeError(f"{what} needs the {package} package ({why}): run {command}.")
