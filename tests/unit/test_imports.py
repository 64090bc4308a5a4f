"""Every torch-only module of the pack imports in a fresh interpreter where ComfyUI cannot be found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib, sys, traceback

for name in ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "server"):
    sys.modules[name] = None  # importing it raises ImportError
sys.path.insert(0, sys.argv[1])
from _load import load_pack

load_pack()
failed = 0
for module in sys.argv[2:]:
    try:
        importlib.import_module("likeness." + module)
    except Exception:
        failed += 1
        print(module, traceback.format_exc(limit=-2), sep="\\n")
sys.exit(failed)
"""


def torch_only() -> list[str]:
    """Dotted names of all modules of core outside of host/ and session/."""
    names = []
    for path in sorted((ROOT / "core").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "host" not in parts and parts[1] != "session":
            names.append(".".join(parts).removesuffix(".__init__"))
    return names


def test_every_torch_only_module_imports_without_comfyui(tmp_path):
    modules = torch_only()
    assert len(modules) > 40 and "core.sine.guidance" in modules
    environment = {name: value for name, value in os.environ.items() if name not in ("COMFYUI_PATH", "PYTHONPATH")}
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "toolbox"), *modules]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode} modules do not import without ComfyUI:\n{done.stdout}{done.stderr}"
