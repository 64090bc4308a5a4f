"""Checks the types of the pack with ty.

The pack is a package of whatever name its folder has, and ComfyUI has modules of the same names as some of its own.
So a copy of the sources named `likeness` is checked, against the ComfyUI of COMFYUI_PATH or of the sandbox. Where
there is none, what ComfyUI provides counts as unknown.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import ROOT, SANDBOX

CHECKED = ("core", "nodes", "toolbox", "benchmarks")
ALSO_IMPORTED = ("toyworld", "tests")  # not checked themselves
IGNORED = (
    "incompatible-method-override",  # execute() of a V3 node names the inputs of that node
    "deprecated",
    "not-callable",  # a torch module's attributes are Tensor | Module to the checker, whatever was assigned
)
OPTIONAL = ("open_clip",)  # at run time
FROM_COMFYUI = (
    "comfy.**",
    "comfy_api.**",
    "comfy_execution.**",
    "folder_paths",
    "latent_preview",
    "server",
    "utils.**",
)
FROM_TESTS = ("utils.**", "playwright.**", "websocket")  # needed beside ComfyUI only


def copy_sources(target: Path) -> list[str]:
    """Copy the Python files of the checked folders; returns the folders that there are."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", target)
    folders = [name for name in CHECKED if (ROOT / name).is_dir()]
    for name in (*folders, *ALSO_IMPORTED):
        for path in (ROOT / name).rglob("*.py"):
            copied = target / path.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
    return folders


def main(arguments: list[str]) -> int:
    """Exit code 0 when the check finds nothing."""
    project = SANDBOX.resolve() / "types"  # ty does not follow a link to the sources
    folders = copy_sources(project / "likeness")
    comfyui = Path(os.environ.get("COMFYUI_PATH") or SANDBOX / "comfyui")
    known = (comfyui / "comfy").is_dir()
    unresolved = OPTIONAL if known else (*OPTIONAL, *FROM_COMFYUI, *FROM_TESTS)
    configuration = f"[analysis]\nallowed-unresolved-imports = {json.dumps(unresolved)}\n"
    (project / "ty.toml").write_text(configuration)  # also makes the copy a project of its own
    command = [
        *(str(Path(sys.executable).with_name("ty")), "check", "--no-progress", "--output-format", "concise"),
        *("--python", sys.executable, "--project", str(project)),
        *(("--extra-search-path", str(comfyui)) if known else ()),
        *(part for rule in IGNORED for part in ("--ignore", rule)),
        *(f"likeness/{name}" for name in ("__init__.py", *folders)),
        *arguments,
    ]
    return subprocess.run(command, cwd=project).returncode
