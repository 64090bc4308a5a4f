"""The demonstration ends with all that it has started, however it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from likeness.toolbox.server import free_port
from likeness.toyworld import workflows


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/system_stats", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_it_takes_its_comfyui_along(number, tmp_path):
    port = free_port()
    load = [sys.executable, str(workflows.ROOT / "toolbox" / "_load.py"), "toolbox.demonstration"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*load, "--port", str(port), "--steps", "5000"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(120) == 128 + number
        assert not answers(port), "its ComfyUI lives on and holds the port"
    finally:
        process.kill()
