"""`python3 toolbox/check.py`: ruff, format, types and all torch-only tests, in under a minute.

ComfyUI is neither installed nor imported (if the sandbox has one, the types are checked against it), and no browser is
used. Arguments are passed to pytest.
"""

from __future__ import annotations

import os
import sys
import time

from _load import load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)
from test import ONE_THREAD, PARALLEL, checks, run, say  # ty: ignore[import-not-found]

HOST = "tests/parity/host"


def main() -> int:
    """Set up and check; the exit code is 0 only if everything passed."""
    load_pack()
    from likeness.toolbox.environment import prepare_check

    start, python = time.monotonic(), prepare_check()
    hidden = ("COMFYUI_PATH", "PYTHONPATH", "PYTHONHOME")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    say(f"set up after {time.monotonic() - start:.0f} s")
    start = time.monotonic()
    tests = [str(python), "-m", "pytest", "-q", *PARALLEL, "tests/unit", "tests/parity"]
    commands = {**checks(python), "tests": [*tests, f"--ignore={HOST}", *sys.argv[1:]]}
    variables |= ONE_THREAD
    failed = [name for name, command in commands.items() if not run(name, command, variables)]
    say(f"FAILED: {', '.join(failed)}" if failed else f"all passed after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
