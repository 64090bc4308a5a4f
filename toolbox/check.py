"""`python3 toolbox/check.py`: ruff, format, types and all torch-only tests, in under a minute.

ComfyUI is neither installed nor imported (if the sandbox has one, the types are checked against it), and no browser is
used. Arguments are passed to pytest.
"""

import os
import sys
import time

from _load import load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)
from test import ONE_THREAD, PARALLEL, checks, report, run  # ty: ignore[import-not-found]


def main() -> int:
    """Set up and check; the exit code is 0 only if everything passed."""
    load_pack()
    from likeness.toolbox.environment import prepare_check

    python = prepare_check()
    hidden = ("COMFYUI_PATH", "PYTHONPATH", "PYTHONHOME")
    variables = {name: value for name, value in os.environ.items() if name not in hidden} | ONE_THREAD
    tests = [str(python), "-m", "pytest", "-q", *PARALLEL, "tests/unit", "tests/parity", "--ignore=tests/parity/host"]
    start = time.monotonic()
    failed = run({**checks(python), "tests": [*tests, *sys.argv[1:]]}, variables)
    report(", ".join(failed) or "all", not failed, start)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
