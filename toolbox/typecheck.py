"""Check the types of the pack with ty.

The pack's package has the name of its folder, and some of its modules have the same names as ComfyUI's. So this checks
a copy of the sources named `likeness`, against the ComfyUI of COMFYUI_PATH or of the sandbox. Without one, ComfyUI's
modules count as unknown.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import ROOT, SANDBOX

CHECKED = ("core", "nodes", "toolbox", "benchmarks")
ALSO_IMPORTED = ("toyworld", "tests")  # copied but not checked
UNKNOWN = ("comfy*.**", "folder_paths", "latent_preview", "server", "utils.**", "playwright.**", "websocket")
"""What only ComfyUI and the tests that need it bring along."""


def main(arguments: list[str]) -> int:
    """Exit code 0 if the check finds nothing."""
    project = SANDBOX / "types"
    shutil.rmtree(project, ignore_errors=True)
    for name in (*CHECKED, *ALSO_IMPORTED):
        shutil.copytree(ROOT / name, project / "likeness" / name)
    shutil.copy(ROOT / "__init__.py", project / "likeness")
    shutil.copy(ROOT / "pyproject.toml", project)
    comfyui = Path(os.environ.get("COMFYUI_PATH") or SANDBOX / "comfyui")
    if (comfyui / "comfy").is_dir():
        more = ["--extra-search-path", str(comfyui)]
    else:
        more = ["--config", f"analysis.allowed-unresolved-imports = {list(UNKNOWN)}"]
    command = [str(Path(sys.executable).with_name("ty")), "check", "--no-progress", "--output-format", "concise"]
    folders = [f"likeness/{name}" for name in ("__init__.py", *CHECKED)]
    return subprocess.run([*command, "--python", sys.executable, *more, *folders, *arguments], cwd=project).returncode
