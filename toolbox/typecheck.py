"""Check the types of the pack with ty.

The pack's package has the name of its folder, and some of its modules have the same names as ComfyUI's. So this checks
a copy of the sources named `likeness`, against the ComfyUI of COMFYUI_PATH or of the sandbox. Without one, ComfyUI's
modules count as unknown.
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
ALSO_IMPORTED = ("toyworld", "tests")  # copied but not checked
IGNORED = (
    "incompatible-method-override",  # execute() of a V3 node names the inputs of that node
    "deprecated",
    "not-callable",  # ty infers Tensor | Module for every attribute of a torch module
)
OPTIONAL = ("open_clip",)  # optional at run time
FROM_COMFYUI = (
    "comfy.**",
    "comfy_api.**",
    "comfy_execution.**",
    "folder_paths",
    "latent_preview",
    "server",
    "utils.**",
)
FROM_TESTS = ("utils.**", "playwright.**", "websocket")  # needed only with ComfyUI


def copy_sources(target: Path) -> list[str]:
    """Copy the Python files of the checked folders; returns the existing folders."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", target)
    folders = [name for name in CHECKED if (ROOT / name).is_dir()]
    for name in (*folders, *ALSO_IMPORTED):
        for path in (ROOT / name).rglob("*.py"):
            destination = target / path.relative_to(ROOT)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, destination)
    return folders


def main(arguments: list[str]) -> int:
    """Exit code 0 if the check finds nothing."""
    project = SANDBOX.resolve() / "types"  # ty does not follow a link to the sources
    folders = copy_sources(project / "likeness")
    comfyui = Path(os.environ.get("COMFYUI_PATH") or SANDBOX / "comfyui")
    has_comfyui = (comfyui / "comfy").is_dir()
    unresolved = OPTIONAL if has_comfyui else (*OPTIONAL, *FROM_COMFYUI, *FROM_TESTS)
    configuration = f"[analysis]\nallowed-unresolved-imports = {json.dumps(unresolved)}\n"
    (project / "ty.toml").write_text(configuration)  # also makes the copy a project of its own
    command = [
        *(str(Path(sys.executable).with_name("ty")), "check", "--no-progress", "--output-format", "concise"),
        *("--python", sys.executable, "--project", str(project)),
        *(("--extra-search-path", str(comfyui)) if has_comfyui else ()),
        *(part for rule in IGNORED for part in ("--ignore", rule)),
        *(f"likeness/{name}" for name in ("__init__.py", *folders)),
        *arguments,
    ]
    return subprocess.run(command, cwd=project).returncode
