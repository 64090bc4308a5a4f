"""benchmarks.gpu, rehearsed on a CPU: every part gives a figure, and what fails is a row and not the end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from likeness.toyworld.workflows import ROOT


def rehearsed(folder) -> list[dict]:
    """The rows of a run of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / "toolbox" / "_load.py"), "benchmarks.gpu", "--tiny", "--out", "card"]
    command += ["--seconds", "3000"]  # a busy machine
    ended = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True, timeout=3000)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert record["machine"]["sizes"] == "tiny, a rehearsal"
    page, text = ((folder / f"card.{end}").read_text(encoding="utf-8") for end in ("html", "md"))
    assert page.count("<tr>") == len(record["rows"]) + 1 and text.count("\n") == len(record["rows"]) + 4
    return record["rows"]


@pytest.mark.slow
def test_every_part_of_every_model_gives_a_figure(tmp_path, record_property):
    from likeness.benchmarks import gpu, gpu_parts

    rows = rehearsed(tmp_path)
    expected = [(name, w, part.title) for name, w, _ in gpu.GROUPS for part in gpu_parts.parts_of(name, w, False)]
    assert [(row["model"], row["weights"], row["part"]) for row in rows] == expected
    assert [row.get("problem") for row in rows] == [None] * len(rows)
    assert all(row["seconds"] > 0 and row["smallest card GB"] == gpu.CARDS[0] for row in rows)
    record_property("parts", len(rows))


def options(**more) -> argparse.Namespace:
    return argparse.Namespace(**{"tiny": True, "dynamic_vram": False, **more})


def test_a_part_that_does_not_fit_or_fails_is_a_row(monkeypatch):
    import comfy.model_management as mm

    from likeness.benchmarks import gpu, gpu_parts

    parts = [gpu_parts.part(title, title, "update") for title in ("full", "wrong", "inversion")]
    monkeypatch.setattr(gpu_parts, "parts_of", lambda *_: parts)

    def full(_bench, _meter):
        raise mm.OOM_EXCEPTION("Tried to allocate\n20 GiB")

    def wrong(_bench, _meter):
        raise ValueError("no such layer")

    monkeypatch.setattr(gpu_parts.Bench, "full", full, raising=False)
    monkeypatch.setattr(gpu_parts.Bench, "wrong", wrong, raising=False)
    rows = list(gpu.group("SD1.5", "bf16", float("inf"), options()))
    assert [row.get("problem") for row in rows] == [
        "out of memory: Tried to allocate 20 GiB",
        "ValueError: no such layer",
        None,
    ]
    assert rows[2]["seconds"] > 0 and rows[2]["unit"] == "update" and rows[2]["weights"] == "bf16"
    assert [row["problem"] for row in gpu.group("SD1.5", "bf16", 0.0, options())] == ["not run: time is up"] * 3


def test_weights_beyond_the_memory_of_the_machine_are_said_before_they_are_made(monkeypatch):
    from likeness.benchmarks import gpu, sizes

    family = sizes.families(tiny=False)["FLUX.1"]
    bytes_of = {name: sizes.weight_bytes(family, how) for name, how in sizes.PRECISIONS.items()}
    assert 23.5e9 < bytes_of["bf16"] < 24.5e9 and bytes_of["bf16"] == 2 * bytes_of["fp8"]
    monkeypatch.setattr(sizes, "free_ram", lambda: 10 * gpu.GB)
    rows = list(gpu.group("FLUX.1", "bf16", float("inf"), options(tiny=False)))
    assert [row["problem"] for row in rows] == ["14 GB more of the machine's memory are needed"]


@pytest.mark.parametrize("peak, card", [(2.9, 4), (2.92, 6), (5.7, 8), (20.0, 24), (200.0, None)])
def test_smallest_card_has_room_for_fragments_and_the_desktop(peak, card):
    from likeness.benchmarks import gpu

    assert gpu.smallest_card(peak) == card
