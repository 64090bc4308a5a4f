"""Checks the syntax of the page's scripts with the node.js that playwright brings along."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from .environment import ROOT


def main(arguments: list[str]) -> int:
    """Exit code 0 when every script in web/js is a well-formed module."""
    from playwright._impl._driver import compute_driver_executable

    node = compute_driver_executable()[0]
    scripts = sorted((ROOT / "web" / "js").glob("*.js"))
    if not scripts:
        raise SystemExit("web/js holds no script.")
    good = True
    for script in scripts:
        with tempfile.TemporaryDirectory() as folder:  # node takes a file for a module by its ending
            module = Path(folder) / f"{script.stem}.mjs"
            module.write_bytes(script.read_bytes())
            good &= subprocess.run([node, "--check", str(module)]).returncode == 0
    return 0 if good else 1
