"""Every test imports the pack as the package `likeness`, as the command-line tools do.

Tests marked `slow` run with --slow only; what they found is kept in benchmarks/results/slow_tests.json.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SLOW_RESULTS = ROOT / "benchmarks" / "results" / "slow_tests.json"

_spec = importlib.util.spec_from_file_location("_load", ROOT / "toolbox" / "_load.py")
assert _spec is not None and _spec.loader is not None
_load = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_load)
_load.load_pack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes, and keep what it found")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_collection_finish() -> None:
    """What was imported stays: to look for garbage in it took a twentieth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_stays_on_shared_models() -> Iterator[None]:
    """For the next test; also where this one failed."""
    yield
    if "comfy.model_management" in sys.modules:
        from . import tiny_models

        tiny_models.restore_shared()


class SlowResults:
    """Outcome, duration and recorded figures of the slow tests, written at the end. Earlier entries of others stay."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "slow" not in report.keywords or report.skipped:
            return
        entry = self._found.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 1)
        entry.update(report.user_properties)
        if report.failed:
            entry["outcome"] = "failed"

    def pytest_sessionfinish(self) -> None:
        if not self._found:
            return
        kept = json.loads(SLOW_RESULTS.read_text())["tests"] if SLOW_RESULTS.exists() else {}
        tests = dict(sorted({**kept, **self._found}.items()))
        passed = sum(entry["outcome"] == "passed" for entry in tests.values())
        seconds = round(sum(entry["seconds"] for entry in tests.values()), 1)
        summary = {"passed": passed, "failed": len(tests) - passed, "seconds": seconds, "tests": tests}
        SLOW_RESULTS.write_text(json.dumps(summary, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--slow") and not hasattr(config, "workerinput"):  # the workers report to one process
        config.pluginmanager.register(SlowResults())
