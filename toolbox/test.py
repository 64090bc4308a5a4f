"""`python3 toolbox/test.py`: sets everything up and checks all that must hold.

Ruff, the type check, the syntax of the page's scripts, then the five tiers of tests and those of the small world.
COMFYUI_PATH uses an existing ComfyUI. Arguments are handed to pytest instead of these.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from _load import ROOT, load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)

TIERS = ("unit", "parity", "contract", "toyworld", "server", "browser")


def say(text: str) -> None:
    print(f"[test] {text}", flush=True)


def checks(python: Path) -> dict[str, list[str]]:
    """The commands that look at the source only."""
    load = [str(python), str(ROOT / "toolbox" / "_load.py")]
    return {
        "ruff": [str(python.with_name(f"ruff{python.suffix}")), "check", str(ROOT)],
        "types": [*load, "toolbox.typecheck"],
        "scripts": [*load, "toolbox.scripts"],
    }


def run(name: str, command: list[str], variables: dict[str, str]) -> bool:
    """Run one check, with its output and its time on the terminal."""
    start = time.monotonic()
    passed = subprocess.run(command, cwd=ROOT, env=variables).returncode == 0
    say(f"{name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - start:.0f} s")
    return passed


def main() -> int:
    """Set up and run everything; the exit code is 0 only when all of it passed."""
    load_pack()
    from likeness.toolbox.environment import prepare
    from likeness.toolbox.small_world import build_models

    environment = prepare()
    build_models(environment)
    variables = environment.variables()
    tiers = sys.argv[1:] or [str(ROOT / "tests" / tier) for tier in TIERS]
    failed = [name for name, command in checks(environment.python).items() if not run(name, command, variables)]
    if not run("tests", [str(environment.python), "-m", "pytest", *tiers], variables):
        failed.append("tests")
    say(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
