"""What to do about a package that only some nodes need."""

from __future__ import annotations

import sys


def missing(what: str, package: str, why: object, asked: str, otherwise: str = "") -> RuntimeError:
    """asked: what pip is to install. The command names the running Python: ComfyUI's portable and desktop versions have
    one of their own, which a bare `pip` does not install into.
    """
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    terminal = "the Command Prompt (cmd)" if sys.platform == "win32" else "a terminal"  # PowerShell runs no quoted path
    command = f"`{python} -m pip install {asked}` in {terminal}{otherwise}, and restart ComfyUI"
    return RuntimeError(f"{what} needs the {package} package ({why}): run {command}.")
