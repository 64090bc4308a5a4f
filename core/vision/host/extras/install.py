"""The error for a missing package that only some nodes need."""

from __future__ import annotations

import sys


def missing_package(what: str, package: str, why: object, asked: str, otherwise: str = "") -> RuntimeError:
    """A RuntimeError with the pip command that installs `asked`. The command uses the running Python's path: ComfyUI's
    portable and desktop versions bring their own Python, into which a bare `pip` does not install.
    """
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    terminal = "the Command Prompt (cmd)" if sys.platform == "win32" else "a terminal"  # PowerShell runs no quoted path
    command = f"`{python} -m pip install {asked}` in {terminal}{otherwise}, and restart ComfyUI"
    return RuntimeError(f"{what} needs the {package} package ({why}): run {command}.")
