"""Load the pack as the package `likeness`, whatever the name of its folder.

ComfyUI has modules called `nodes` and `server`, so neither the project root nor this folder may be on sys.path. Run as
a program, it starts one of the pack's modules: `python toolbox/_load.py toolbox.typecheck [arguments]`.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
NAME = "likeness"


def load_pack() -> ModuleType:
    """Import the pack as `likeness`; its subpackages (core, toolbox, toyworld...) can be imported afterwards."""
    hidden = (ROOT, ROOT / "toolbox")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hidden]
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return sys.modules[NAME]


def run(module: str, arguments: list[str]) -> int:
    """Call main(arguments) of `likeness.<module>` and return its exit code."""
    load_pack()
    try:
        return importlib.import_module(f"{NAME}.{module}").main(arguments) or 0
    except KeyboardInterrupt:
        return 130


def set_up_and_run(module: str, arguments: list[str]) -> int:
    """Set up the sandbox and the toyworld, then run a module in the sandbox's Python."""
    load_pack()
    from likeness.toolbox.environment import prepare
    from likeness.toyworld.workflows import build_models

    environment = prepare(browser=False)
    build_models(environment)
    command = [str(environment.python), str(Path(__file__).resolve()), module, *arguments]
    if os.name == "posix":  # so that a signal reaches the module itself, which ends what it has started
        os.execve(command[0], command, environment.variables())
    return subprocess.run(command, env=environment.variables()).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Give the module to run, for example: toolbox.typecheck")
    sys.exit(run(sys.argv[1], sys.argv[2:]))
