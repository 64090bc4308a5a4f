"""Seconds and peak memory of every method on your own card, at the published sizes, in under 8 minutes: no file needed.

    python toolbox/_load.py benchmarks.gpu

Run it with the Python of your ComfyUI (COMFYUI_PATH names another one). The models have random weights: time and memory
do not depend on them. Results are written after each part, to likeness_gpu.json, .md and .html, which you can send. A
part that does not fit into the memory is a row too, and the next one follows. --tiny rehearses it all on a CPU.

Peak: the most that torch's allocator held, with the weights. The smallest card: the first one with room for that, a
tenth for fragments and 0.8 GB for the driver and the desktop. ComfyUI can also sample with a part of the weights off
the card, which a training cannot.
"""

from __future__ import annotations

import argparse
import gc
import html
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import hosting

BUDGET, LIMIT, STREAMED = 390.0, 60.0, 60.0  # seconds: of all, of a part at most, left for dynamic VRAM
FRAGMENTS, DRIVER = 1.1, 0.8  # share, GB
CARDS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 192)
COLUMNS = ("model", "weights", "part", "seconds", "unit", "peak GB", "smallest card GB", "problem")
GROUPS = (  # by worth; the share of the time, of which the next ones inherit what is left
    ("SD1.5", "bf16", 0.22),
    ("SDXL", "bf16", 0.24),
    ("FLUX.1", "fp8", 0.18),
    ("Z-Image", "bf16", 0.18),
    ("FLUX.1", "bf16", 0.12),
    ("SDXL", "fp8", 0.06),
)
GB = 2**30
Row = dict[str, Any]


def smallest_card(peak_gb: float) -> int | None:
    """The first of the usual cards with room for a peak; None for more than all."""
    return next((card for card in CARDS if peak_gb * FRAGMENTS + DRIVER <= card), None)


def release(model: Any = None) -> None:
    """Free what is loaded, but for this MODEL."""
    import comfy.model_management as mm

    gc.collect()
    kept = (
        []
        if model is None
        else [each for each in mm.current_loaded_models if each.model and each.model.is_clone(model)]
    )
    mm.free_memory(1e30, mm.get_torch_device(), kept)
    mm.soft_empty_cache()


def measured(bench: Any, part: Any, streamed: bool) -> Row:
    """A part's figures, or what kept it from having any."""
    import comfy.model_management as mm

    from .gpu_parts import Meter

    meter = Meter(mm.get_torch_device(), bench.weights, streamed)
    alarm = threading.Timer(LIMIT, mm.interrupt_current_processing, (True,))
    alarm.start()
    problem = ""
    try:
        getattr(bench, part.method)(meter, **part.how)
    except mm.InterruptProcessingException:
        problem = f"took more than {LIMIT:.0f} s"
    except mm.OOM_EXCEPTION as error:
        problem = f"out of memory: {error}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        alarm.cancel()
        mm.interrupt_current_processing(False)
        release(bench.model)
    if problem:
        return {"problem": " ".join(problem.split())[:200]}
    figures = {"seconds": round(meter.seconds, 4), "runs": meter.runs, "peak GB": round(meter.peak, 3)}
    return {**figures, "smallest card GB": smallest_card(meter.peak)}


def group(name: str, weights: str, until: float, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each part of a model."""
    from . import gpu_parts, sizes

    how, about = sizes.PRECISIONS[weights], {"model": name, "weights": weights}
    family = sizes.families(options.tiny)[name]
    room = sizes.free_ram() - 1.1 * sizes.weight_bytes(family, how)
    if room < 0:
        yield {**about, "part": "all", "problem": f"{-room / GB:.0f} GB more of the machine's memory are needed"}
        return
    try:
        bench = gpu_parts.Bench(name, how, options.tiny)
    except Exception as error:
        yield {**about, "part": "all", "problem": f"{type(error).__name__}: {error}"[:200]}
        return
    for part in gpu_parts.parts_of(name, weights, options.dynamic_vram):
        row = {**about, "part": part.title, "unit": part.unit}
        if time.monotonic() > until:
            yield {**row, "problem": "not run: time is up"}
        else:
            yield {**row, **measured(bench, part, options.dynamic_vram)}
    del bench
    release()


def stream_weights() -> bool:
    """Switch ComfyUI's dynamic VRAM on, as its main.py does; whether it has one that works here."""
    names = "comfy.memory_management", "comfy.model_management", "comfy.model_patcher", "comfy_aimdo.control"
    modules: list[Any] = [importlib.import_module(name) for name in names]
    memory, mm, patcher, control = modules
    control.init()
    devices = mm.get_all_torch_devices()
    try:
        works = control.init_devices((device.index, 0) for device in devices)
    except TypeError:
        works = control.init_devices(device.index for device in devices)
    if works:
        patcher.CoreModelPatcher, memory.aimdo_enabled = patcher.ModelPatcherDynamic, True
    return bool(works)


def in_new_process(options: argparse.Namespace) -> list[Row]:
    """The rows under dynamic VRAM, from a process of its own, which may crash."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "streamed"
        command = [
            sys.executable,
            str(Path(__file__).parents[1] / "toolbox" / "_load.py"),
            "benchmarks.gpu",
            "--dynamic-vram",
        ]
        command += ["--seconds", str(STREAMED), "--out", str(out)]
        try:
            subprocess.run(command, timeout=STREAMED + LIMIT, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            return [{"model": "all", "weights": "dynamic VRAM", "part": "all", "problem": str(error)[:200]}]
        rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    return [{**row, "weights": f"{row['weights']}, dynamic VRAM"} for row in rows]


def machine(options: argparse.Namespace) -> Row:
    """What the figures depend on."""
    import comfy.model_management as mm
    import comfyui_version
    import torch

    device = mm.get_torch_device()
    return {
        "device": mm.get_torch_device_name(device),
        "memory GB": round(mm.get_total_memory(device) / GB, 1),
        "RAM GB": round(mm.get_total_memory(torch.device("cpu")) / GB, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": comfyui_version.__version__,
        "dynamic VRAM": options.dynamic_vram,
        "sizes": "tiny, a rehearsal" if options.tiny else "published",
    }


def cells(row: Row) -> list[str]:
    """A row as text."""
    return [f"{row[name]:.3g}" if isinstance(row.get(name), float) else str(row.get(name) or "") for name in COLUMNS]


def markdown(about: Row, rows: list[Row]) -> str:
    """The table for a page of text."""
    lines = [", ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(
        [*lines, *("| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in rows), ""]
    )


def page(about: Row, rows: list[Row]) -> str:
    """The table as a page."""

    def line(tag: str, values: Any) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    style = "body{font:15px sans-serif;margin:2em}td,th{padding:2px 10px;border-bottom:1px solid #ccc;text-align:left}"
    head = f'<!doctype html><meta charset="utf-8"><title>ComfyUI-Likeness on this card</title><style>{style}</style>'
    table = line("th", COLUMNS) + "".join(line("td", cells(row)) for row in rows)
    return f"{head}<h1>ComfyUI-Likeness</h1><pre>{html.escape(json.dumps(about, indent=1))}</pre><table>{table}</table>"


def write(out: Path, about: Row, rows: list[Row]) -> None:
    """All three files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(about, rows), encoding="utf-8")
    out.with_suffix(".html").write_text(page(about, rows), encoding="utf-8")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Seconds and peak memory of every method.")
    parser.add_argument("--tiny", action="store_true", help="rehearse it on the CPU, with tiny models")
    parser.add_argument("--only", nargs="+", choices=sorted({name for name, *_ in GROUPS}), help="these models alone")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="how long it may take")
    parser.add_argument("--dynamic-vram", action="store_true", help="with ComfyUI's dynamic VRAM, where it has one")
    parser.add_argument("--out", type=Path, default=Path("likeness_gpu"), help="the files, without their ends")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure and write; exit code 1 if no part gave a figure."""
    options, began = parse(arguments), time.monotonic()
    hosting.start(max(1, (os.cpu_count() or 2) // 2), cpu=options.tiny)
    import comfy.model_patcher

    from . import sizes
    from .frame import say

    if options.dynamic_vram and not stream_weights():
        sys.exit("This ComfyUI has no dynamic VRAM that works here.")
    about, rows = machine(options), list[Row]()
    known, share = sizes.families(options.tiny), 0.0
    child = not options.tiny and not options.dynamic_vram and hasattr(comfy.model_patcher, "ModelPatcherDynamic")
    seconds = options.seconds - (STREAMED if child else 0.0)
    for name, weights, part in GROUPS:
        share += part
        if name not in known or weights not in sizes.PRECISIONS or name not in (options.only or known):
            continue
        for row in group(name, weights, began + share * seconds, options):
            rows.append(row)
            write(options.out, about, rows)
            say(f"{time.monotonic() - began:4.0f} s  " + "  ".join(filter(None, cells(row))))
    if child:
        rows += in_new_process(options)
        write(options.out, about, rows)
    say(f"{options.out.with_suffix('.html').resolve()}")
    return int(not any("seconds" in row for row in rows))
