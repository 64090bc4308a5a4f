"""The report on a user's own card: what fits the checkpoint runs, what does not is said, and the page shows both."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from likeness.toyworld import workflows


@pytest.mark.slow
def test_it_runs_what_fits_and_says_what_does_not(tmp_path):
    photo = workflows.draw_subject(tmp_path)
    checkpoint = workflows.MODELS / "checkpoints" / "likeness_small_world.safetensors"
    command = [sys.executable, str(workflows.ROOT / "toolbox" / "report.py"), "--checkpoint", str(checkpoint)]
    command += ["--image", str(photo), "--subject", "a <dog>", "--size", "96", "--share", "0.0134", "--cpu"]
    command += ["--only", "1", "3", "--out", "report"]
    ended = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    hiper, ezigen = record["outcomes"]
    assert hiper["seconds"] > 0 and not hiper["problem"] and "5 tokens" in hiper["texts"]["Keep my subject"]
    assert [(tmp_path / "report" / name).is_file() for name in hiper["images"]["Result"]] == [True]
    assert "checkpoint-200000" in ezigen["problem"] and not ezigen["images"]
    assert record["machine"]["checkpoint"] == checkpoint.name and any(
        "hiper: 4 steps" in line for line in record["log"]
    )
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    shown = 1 + sum(len(each) for each in hiper["images"].values())  # the photo too
    assert page.count("data:image/png;base64,") == shown >= 2
    assert "a &lt;dog&gt;" in page and "a <dog>" not in page


def test_a_missing_file_is_said_before_anything_starts(tmp_path):
    command = [sys.executable, str(workflows.ROOT / "toolbox" / "report.py"), "--checkpoint", "none.safetensors"]
    command += ["--image", "none.png", "--subject", "a dog", "--comfyui", os.environ["COMFYUI_PATH"]]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "--checkpoint: there is no file none.safetensors" in ended.stderr
    assert not list(tmp_path.iterdir())
