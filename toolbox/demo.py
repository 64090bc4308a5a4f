"""`python3 toolbox/demo.py`: sets everything up and runs the shipped HiPer graph in the small world, headless.

With --serve the server keeps running afterwards, to open the same graph in the browser. COMFYUI_PATH uses an existing
ComfyUI.
"""

from __future__ import annotations

import subprocess
import sys

from _load import ROOT, load_pack  # ty: ignore[import-not-found] (this folder is on the path of a script)


def main() -> int:
    """Set up, then go on in the sandbox's Python."""
    load_pack()
    from likeness.toolbox.environment import prepare
    from likeness.toolbox.small_world import build_models

    environment = prepare(browser=False)
    build_models(environment)
    command = [str(environment.python), str(ROOT / "toolbox" / "_load.py"), "toolbox.demonstration", *sys.argv[1:]]
    try:
        return subprocess.run(command, env=environment.variables()).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
