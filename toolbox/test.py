"""`python3 toolbox/test.py [--slow]`: set everything up and run all checks.

Ruff and the types; then tests without a server, on two cores; then those of the server, beside the small world's and
the browser's, which take as long. `--slow` adds tests that take minutes and keeps their results in benchmarks/results/.
COMFYUI_PATH uses an existing ComfyUI. Other arguments are passed to pytest instead of the tiers.
"""

import functools
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _load import ROOT, load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)

IN_PROCESS = ("unit", "parity", "trainer", "vision", "contract", "input", "trials")
IN_PARALLEL = {"server": ("server",), "small world and browser": ("toyworld", "browser")}
PARALLEL = ("-n", "2", "--dist", "loadfile")
ONE_THREAD = {"LIKENESS_TEST_THREADS": "1", "OMP_NUM_THREADS": "1"}


def checks(python: Path) -> dict[str, list[str]]:
    """The commands that only read the source."""
    ruff = str(python.with_name(f"ruff{python.suffix}"))
    return {
        "ruff": [ruff, "check", str(ROOT)],
        "format": [ruff, "format", "--check", "-q", str(ROOT)],
        "types": [str(python), str(ROOT / "toolbox" / "_load.py"), "toolbox.typecheck"],
    }


def report(name: str, passed: bool, start: float) -> list[str]:
    """Print the result of a check; returns its name if it failed."""
    print(f"[test] {name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - start:.0f} s", flush=True)
    return [] if passed else [name]


def run(commands: dict[str, list[str]], variables: dict[str, str]) -> list[str]:
    """Run checks one after the other; returns those that failed."""
    failed = []
    for name, command in commands.items():
        start = time.monotonic()
        failed += report(name, subprocess.run(command, cwd=ROOT, env=variables).returncode == 0, start)
    return failed


def run_parallel(commands: dict[str, list[str]], variables: dict[str, str]) -> list[str]:
    """Run checks in parallel and print the output of each as a block; returns those that failed."""
    start, failed = time.monotonic(), []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(functools.partial(subprocess.run, cwd=ROOT, env=variables, **streams), commands.values())
        for name, job in zip(commands, jobs, strict=True):
            print(job.stdout, end="")
            failed += report(name, job.returncode == 0, start)
    return failed


def main() -> int:
    """Set up and run everything; the exit code is 0 only if everything passed."""
    load_pack()
    from likeness.toolbox.environment import prepare
    from likeness.toyworld.workflows import build_models

    environment = prepare()
    build_models(environment)
    start, variables = time.monotonic(), environment.variables()
    failed = run(checks(environment.python), variables)
    slow = [argument for argument in sys.argv[1:] if argument == "--slow"]
    arguments = [argument for argument in sys.argv[1:] if argument != "--slow"]
    pytest = [str(environment.python), "-m", "pytest", *slow]
    if arguments:
        failed += run({"tests": [*pytest, *arguments]}, variables)
    else:
        pytest, variables = [*pytest, "-q", "--durations=10"], variables | ONE_THREAD
        in_process = [*pytest, *PARALLEL, *(f"tests/{tier}" for tier in IN_PROCESS)]
        failed += run({"in process": in_process}, variables)
        halves = {name: [*pytest, *(f"tests/{tier}" for tier in tiers)] for name, tiers in IN_PARALLEL.items()}
        failed += run_parallel(halves, variables)
    report(", ".join(failed) or "all", not failed, start)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
