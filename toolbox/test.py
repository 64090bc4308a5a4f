"""`python3 toolbox/test.py [--slow]`: set everything up and run all checks.

Ruff and the types; then the tests without a server, on two cores; then those of the server and of the browser, in
parallel. `--slow` adds tests that take minutes and stores their results in benchmarks/results/. COMFYUI_PATH uses an
existing ComfyUI. Other arguments are passed to pytest instead of the tiers.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from _load import ROOT, load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)

IN_PROCESS = ("unit", "parity", "trainer", "vision", "contract", "input", "trials", "toyworld")
WITH_SERVER = ("server", "browser")
PARALLEL = ("-n", "2", "--dist", "loadfile")
ONE_THREAD = {"LIKENESS_TEST_THREADS": "1", "OMP_NUM_THREADS": "1"}


def say(text: str) -> None:
    print(f"[test] {text}", flush=True)


def checks(python: Path) -> dict[str, list[str]]:
    """The commands that only read the source."""
    load = [str(python), str(ROOT / "toolbox" / "_load.py")]
    ruff = str(python.with_name(f"ruff{python.suffix}"))
    return {
        "ruff": [ruff, "check", str(ROOT)],
        "format": [ruff, "format", "--check", "-q", str(ROOT)],
        "types": [*load, "toolbox.typecheck"],
    }


def run(name: str, command: list[str], variables: dict[str, str]) -> bool:
    """Run one check and print its output and duration."""
    start = time.monotonic()
    passed = subprocess.run(command, cwd=ROOT, env=variables).returncode == 0
    say(f"{name}: {'passed' if passed else 'FAILED'} after {time.monotonic() - start:.0f} s")
    return passed


def output(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """The exit code and the whole output of a command."""
    streams = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=streams[0], stderr=streams[1], text=True, errors="replace"
    )
    return process.returncode, process.stdout


def run_parallel(commands: dict[str, list[str]], variables: dict[str, str]) -> list[str]:
    """Run several checks in parallel; print each output as a block when it ends. Returns those that failed."""
    start, failed = time.monotonic(), []
    with ThreadPoolExecutor(len(commands)) as pool:
        jobs = {pool.submit(output, command, variables): name for name, command in commands.items()}
        for job in as_completed(jobs):
            code, text = job.result()
            print(text, end="")
            say(f"{jobs[job]}: {'FAILED' if code else 'passed'} after {time.monotonic() - start:.0f} s")
            failed += [jobs[job]] if code else []
    return failed


def tests(python: Path, variables: dict[str, str], slow: list[str]) -> list[str]:
    """Run all tiers; returns those that failed."""
    pytest = [str(python), "-m", "pytest", "-q", "--durations=10", *slow]
    folders = [str(ROOT / "tests" / tier) for tier in IN_PROCESS]
    one_thread = variables | ONE_THREAD
    failed = [] if run("in process", [*pytest, *PARALLEL, *folders], one_thread) else ["in process"]
    servers = {tier: [*pytest, str(ROOT / "tests" / tier)] for tier in WITH_SERVER}
    return failed + run_parallel(servers, one_thread)


def main() -> int:
    """Set up and run everything; the exit code is 0 only if everything passed."""
    load_pack()
    from likeness.toolbox.environment import prepare
    from likeness.toyworld.workflows import build_models

    environment = prepare()
    build_models(environment)
    start, variables = time.monotonic(), environment.variables()
    failed = [name for name, command in checks(environment.python).items() if not run(name, command, variables)]
    slow, arguments = (
        [argument for argument in sys.argv[1:] if (argument == "--slow") == is_slow] for is_slow in (True, False)
    )
    if arguments:
        command = [str(environment.python), "-m", "pytest", *slow, *arguments]
        failed += [] if run("tests", command, variables) else ["tests"]
    else:
        failed += tests(environment.python, variables, slow)
    summary = f"FAILED: {', '.join(failed)}" if failed else "all passed"
    say(f"{summary} after {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
