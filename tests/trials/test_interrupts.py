"""Interrupts at random points of the long nodes, by ComfyUI's own executor: nothing is left, nothing is lost.

The button is pressed at a call of any Python function while the node runs; ComfyUI obeys it where it next looks.
"""

from __future__ import annotations

import random
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from likeness.core.files import read_tensors
from likeness.core.fit.runs import digest

from .. import narrow_world
from . import long_nodes
from .long_nodes import CASES, LAYER, LORA, PATCHES, PICTURES, TARGET

POINTS, SAMPLE = 100, 6  # the second number: in the normal tier
_draw = random.Random(17)
_cases, _patches = (_draw.sample(list(table), len(table)) for table in (CASES, PATCHES))
TRIALS = [
    (_cases[number % len(_cases)], _patches[(number + number // len(_cases)) % len(_patches)], _draw.random())
    for number in range(POINTS)
]


class Interrupter:
    """Counts the calls of Python functions from the moment at which a node runs, and presses the button at one."""

    def __init__(self, start: CodeType, at: int | None = None) -> None:
        self.calls, self._start, self._at = -1, start, at

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event != "call" or (self.calls < 0 and frame.f_code is not self._start):
            return
        self.calls += 1
        if self.calls == self._at:
            import nodes

            sys.setprofile(None)
            nodes.interrupt_processing()


class Bench:
    """The executor with the long nodes' graphs."""

    def __init__(self, server: Any) -> None:
        self.server, self.things, self.results = server, long_nodes.Things(), list[Any]()
        self.user, self.updates = server.base / "user" / "likeness", 0
        self._uninterrupted: dict[tuple[str, str], tuple[str, int]] = {}
        long_nodes.register(self.things, self.results)
        narrow_world.draw(server.base / "input" / PICTURES, range(2), 2)
        _write_lora(server.base / "models" / "loras" / LORA)
        self.weights = self.things.weights()

    def run(self, case: str, patch: str, interrupter: Interrupter | None = None) -> str:
        """Execute the node anew; the digest of its results, or the status when it did not succeed."""
        prompt = long_nodes.prompt(case, patch)
        prompt[TARGET]["inputs"]["executed"] = uuid.uuid4().hex
        self.results.clear()
        self.updates = 0
        sys.setprofile(interrupter)
        try:
            status = self.server.run(prompt).status
        finally:
            sys.setprofile(None)
        return digest(plain(self.results)) if status == "execution_success" else status

    def uninterrupted(self, case: str, patch: str) -> tuple[str, int]:
        """The digest of the results, and the calls that it took."""
        if (case, patch) not in self._uninterrupted:
            counter = Interrupter(code_of(CASES[case].node))
            self._uninterrupted[case, patch] = self.run(case, patch, counter), counter.calls
            assert self.updates == CASES[case].updates
        return self._uninterrupted[case, patch]

    def forget(self) -> None:
        shutil.rmtree(self.user, ignore_errors=True)


@pytest.fixture(scope="session")
def session_bench(server) -> Iterator[Bench]:
    import comfy.model_management as mm
    import comfy.utils

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: mm.throw_exception_if_processing_interrupted())
    yield Bench(server)  # as main.py, each progress bar looks at the button
    comfy.utils.set_progress_bar_global_hook(before)


@pytest.fixture
def bench(session_bench, monkeypatch) -> Bench:
    """Counts the updates of all fits."""
    from likeness.core.session import job

    train = job.train

    def counted(fit: Any, *arguments: Any) -> Any:
        update = fit.update

        def one() -> Any:
            shown = update()
            session_bench.updates += 1
            return shown

        fit.update = one
        return train(fit, *arguments)

    monkeypatch.setattr(job, "train", counted)
    monkeypatch.setattr("likeness.core.ezigen.host.train.CHECKED", 2)
    session_bench.forget()
    return session_bench


def code_of(node: str) -> CodeType:
    import nodes

    return nodes.NODE_CLASS_MAPPINGS[node].execute.__func__.__wrapped__.__code__


def plain(value: Any) -> Any:
    """Numbers, texts and tensors of a node's result."""
    if hasattr(value, "model_options") and hasattr(value, "clone"):
        from likeness.core.session.fingerprint import patches_digest

        return patches_digest(value)
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return plain(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else value


def _write_lora(path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(4)
    up, down = torch.randn(64, 2, generator=draw), 0.1 * torch.randn(2, 64, generator=draw)
    save_file({f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down}, path)


def trials() -> Iterator[Any]:
    for number, (case, patch, point) in enumerate(TRIALS):
        marks = [] if number < SAMPLE else [pytest.mark.slow]
        yield pytest.param(case, patch, point, id=f"{case}-{patch}-{point:.2f}", marks=marks)


@pytest.mark.parametrize(("case", "patch", "point"), list(trials()))
def test_an_interrupt_leaves_nothing_and_loses_nothing(bench, case, patch, point):
    wanted, calls = bench.uninterrupted(case, patch)
    bench.forget()
    ended = bench.run(case, patch, Interrupter(code_of(CASES[case].node), 1 + int(point * calls)))
    done = bench.updates
    assert ended in ("execution_interrupted", wanted), "an error hid the interrupt, or changed the result"
    assert bench.things.weights() == bench.weights
    whole_files(bench.server.base)
    assert bench.run(case, patch) == wanted
    assert done + bench.updates == CASES[case].updates, "an update was lost or made twice"
    assert bench.run(case, patch) == wanted and bench.updates == 0
    assert bench.things.weights() == bench.weights


def whole_files(base: Path) -> None:
    """Nothing is left of a file that was being written."""
    assert not list(base.rglob("*.tmp"))
    for path in base.glob("user/**/*.safetensors"):
        read_tensors(path, path.stat().st_size)
