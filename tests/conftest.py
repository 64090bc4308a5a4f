"""Every test imports the pack as the package `likeness`, as the command-line tools do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("_load", Path(__file__).parents[1] / "toolbox" / "_load.py")
assert _spec is not None and _spec.loader is not None
_load = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_load)
_load.load_pack()
